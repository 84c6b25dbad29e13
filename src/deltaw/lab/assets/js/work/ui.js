// What the workbench's pages share: elements, questions to the server, and streams of events.

import { make, table } from "../charts.js";

export { make, table };

// The JSON that the server answers to GET /api/work/PATH. Throws an Error with the server's sentence.
export const ask = (path, options = {}) => json(path, options);

// The same for a POST of `body`, which may change something.
export const post = (path, body = {}, options = {}) =>
  json(path, { ...options, method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) });

async function json(path, options) {
  let response;
  try {
    response = await fetch(`api/work/${path}`, options);
  } catch (problem) {
    if (problem.name === "AbortError") throw problem;
    throw new Error("The lab does not answer: is it still running?");
  }
  let body = {};
  try { body = await response.json(); } catch { /* told by its status */ }
  if (!response.ok) {
    const why = typeof body.detail === "string" ? body.detail : `The lab answered ${response.status}.`;
    throw Object.assign(new Error(why), { status: response.status, body });
  }
  return body;
}

// Server-sent events of /api/work/PATH: `on(event, id)` for each, `state("open" | "lost")` as the connection comes and
// goes; the browser connects again by itself and says how far it was. Returns a function that closes it.
export function stream(path, on, state = () => {}) {
  const source = new EventSource(`api/work/${path}`);
  source.onmessage = (message) => on(JSON.parse(message.data), message.lastEventId);
  source.onopen = () => state("open");
  source.onerror = () => state("lost");
  return () => source.close();
}

export function button(label, act, attributes = {}) {
  const made = make("button", { type: "button", ...attributes }, label);
  made.addEventListener("click", act);
  return made;
}

export const link = (href, ...children) => make("a", { href }, ...children);

// A place for one sentence: `say(text)` for a status, `say.problem(error)` for what went wrong, `say()` for nothing.
export function teller() {
  const node = make("p", { class: "said", role: "status" });
  const say = (text = "") => { node.className = "said"; node.textContent = text; };
  say.problem = (error) => { node.className = "said problem"; node.textContent = error.message; };
  say.node = node;
  return say;
}

// A labelled input: `input` gets `id`; `hint` is read with it.
export function field(id, label, input, hint = "") {
  input.id = id;
  const parts = [make("label", { for: id }, label), input];
  if (hint) {
    input.setAttribute("aria-describedby", `${id}-hint`);
    parts.push(make("small", { id: `${id}-hint` }, hint));
  }
  return make("div", { class: "field" }, ...parts);
}
