// The playground: one prompt, answered side by side, token by token.

import { ask, button, field, link, make, teller } from "./ui.js";
import { count } from "./show.js";

const kindOf = (asked) => (asked === "base" ? "the base alone" : asked.startsWith("registry:") ? "from the registry" : asked.startsWith("run:") ? "a run's adapter" : "given to the lab");
const nameOf = (asked) => asked.replace(/^\w+:/, "");

async function show(root, rest, query) {
  let told = await ask("ask/choices");
  if (!root.isConnected) return undefined; // a page that was left leaves the address alone
  const number = (name, low, high, step, fallback) => make("input", { type: "number", min: low, max: high, step, value: query.get(name) ?? fallback });
  const chosen = new Map();
  const say = teller();
  const inputs = {
    prompt: make("textarea", { rows: "3", maxlength: "8000" }),
    tokens: number("tokens", 1, told.longest, 1, "64"),
    temperature: number("temperature", 0, 5, 0.1, "0"),
    seed: number("seed", 0, 2 ** 53 - 1, 1, "0"),
    chat: make("input", { type: "checkbox", id: "chat" }),
  };
  inputs.prompt.value = query.get("prompt") ?? "";
  inputs.chat.checked = query.get("chat") === "true" && told.has_template;
  inputs.chat.disabled = !told.has_template;
  const who = make("ul", { class: "chosen", "aria-label": "Who answers" });
  const found = make("ul", { class: "choices" });
  const search = make("input", { type: "search", maxlength: "100" });
  const columns = make("div", { class: "answers" });
  let running = null;

  const state = () => {
    const next = new URLSearchParams({ adapters: [...chosen.keys()].join(",") });
    for (const [key, fallback] of [["prompt", ""], ["tokens", "64"], ["temperature", "0"], ["seed", "0"]]) if (inputs[key].value !== fallback) next.set(key, inputs[key].value);
    if (inputs.chat.checked) next.set("chat", "true");
    history.replaceState(null, "", `#ask?${next}`);
  };
  const add = (asked) => {
    if (chosen.size >= told.most) { say(`At most ${told.most} answer at once: take one away first.`); return; }
    chosen.set(asked, true);
    listed();
  };
  function listed() {
    state();
    who.replaceChildren(...[...chosen.keys()].map((asked) => make("li", {}, make("span", {}, make("strong", {}, nameOf(asked)), ` ${kindOf(asked)}`),
      button("Take away", () => { chosen.delete(asked); listed(); }, { "aria-label": `Take away ${nameOf(asked)}` }))));
    if (!chosen.size) who.append(make("li", { class: "soft" }, "nobody yet: choose below"));
    const rows = [["base", "base", "the base alone"], ...told.given.map((n) => [`given:${n}`, n, "given to the lab"]), ...told.runs.map((n) => [`run:${n}`, n, "a run's adapter"]),
      ...told.registry.flatMap((r) => Object.entries(r.labels).map(([label, v]) => [label === "current" ? `registry:${r.name}` : `registry:${r.name}@${label}`, label === "current" ? r.name : `${r.name}@${label}`,
        `${label} is version ${v}${r.fits === "no" ? ", of another base" : ""}`]))];
    const words = search.value.toLowerCase().split(/\s+/);
    const hits = rows.filter(([asked, n]) => !chosen.has(asked) && words.every((w) => n.toLowerCase().includes(w)));
    found.replaceChildren(...hits.slice(0, 8).map(([asked, n, about]) => make("li", {}, button(n, () => add(asked), { "aria-label": `Ask ${n}, ${about}` }), make("small", {}, ` ${about}`))));
    if (!hits.length) found.append(make("li", { class: "soft" }, "no other name holds these words"));
    if (told.more || hits.length > 8) found.append(make("li", { class: "soft" }, "... and more: search, or write NAME@VERSION and press Enter"));
  }
  let late = 0;
  search.addEventListener("input", () => {
    clearTimeout(late);
    late = setTimeout(async () => {
      try { told = await ask(`ask/choices?${new URLSearchParams({ search: search.value.split("@")[0] })}`); listed(); } catch (problem) { say.problem(problem); }
    }, 150);
  });
  search.addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    event.preventDefault();
    if (search.value.trim()) { add(`registry:${search.value.trim()}`); search.value = ""; listed(); }
  });

  const go = make("button", { type: "submit", class: "main" }, "Ask");
  const stop = button("Stop", () => running?.abort());
  stop.disabled = true;
  const form = make("form", { class: "panel", "aria-label": "The prompt" },
    field("prompt", "Prompt", inputs.prompt, "The text itself goes on, as in training on prompt and completion; with the chat template it is a user's turn."),
    make("div", { class: "line" }, field("tokens", "longest answer, tokens", inputs.tokens), field("temperature", "temperature", inputs.temperature, "0: always the likeliest token"), field("seed", "seed", inputs.seed),
      make("label", { class: "check" }, inputs.chat, told.has_template ? "chat template" : "chat template (this base has none)")),
    make("div", { class: "row" }, go, stop), say.node);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (running) return;
    if (!chosen.size) { say("Choose who answers."); return; }
    if (!inputs.prompt.value) { say("Write a prompt."); inputs.prompt.focus(); return; }
    state();
    running = new AbortController();
    go.disabled = true;
    stop.disabled = false;
    const body = { prompt: inputs.prompt.value, adapters: [...chosen.keys()], max_tokens: Number(inputs.tokens.value), temperature: Number(inputs.temperature.value), seed: Number(inputs.seed.value), chat: inputs.chat.checked };
    try {
      say("The first prompt loads the base into the engine; then all answer together.");
      say(await answers(columns, body, running.signal));
    } catch (problem) {
      if (problem.name === "AbortError") say("Stopped.");
      else say.problem(problem);
    } finally {
      running = null;
      go.disabled = false;
      stop.disabled = true;
      for (const box of columns.querySelectorAll("[aria-busy=true]")) box.setAttribute("aria-busy", "false");
    }
  });
  for (const input of Object.values(inputs)) input.addEventListener("change", state);
  root.append(make("div", { class: "two" }, form, make("section", { class: "panel", "aria-label": "Who answers" }, make("h2", {}, "Who answers"), who, field("who", "Search adapters", search), found)), columns);
  for (const asked of (query.get("adapters") ?? "base").split(",").filter(Boolean).slice(0, told.most)) chosen.set(asked, true);
  listed();
  return () => { clearTimeout(late); running?.abort(); };
}

// Read the events of one prompt into columns; gives back what there is to say at the end.
async function answers(root, body, signal) {
  const headers = { "content-type": "application/json" };
  const response = await fetch("api/work/ask", { method: "POST", headers, body: JSON.stringify(body), signal });
  if (!response.ok) throw new Error((await response.json().catch(() => ({}))).detail ?? `The lab answered ${response.status}.`);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  const began = performance.now();
  let boxes = [];
  let left = "";
  let last = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    const parts = (left + value).split("\n\n");
    left = parts.pop();
    for (const part of parts) {
      const told = JSON.parse(part.replace(/^data: /, ""));
      if (told.event === "start") {
        boxes = told.columns.map((c) => box(c));
        root.replaceChildren(...boxes.map((b) => b.node));
      } else if (told.event === "done") {
        last = `${count(told.tokens)} tokens in ${((performance.now() - began) / 1000).toFixed(1)} s; up to ${told.together} answers shared each step of the engine.`;
      } else boxes[told.column].take(told);
    }
  }
  return last;
}

function box(column) {
  const text = make("blockquote", { "aria-live": "off", "aria-busy": "true", tabindex: "0", "aria-label": `Answer of ${column.name}` });
  const foot = make("p", { class: "soft", role: "status" });
  const title = make("h3", {}, column.name, make("small", {}, ` ${kindOf(column.asked)}`));
  const node = make("figure", {}, title, text, foot);
  let tokens = 0;
  const ends = { stop: "came to its end", length: "reached the longest answer", cancelled: "stopped" };
  const take = (told) => {
    if (told.text) text.append(told.text);
    if (told.event === "token") tokens += 1;
    if (told.event !== "end") return;
    text.setAttribute("aria-busy", "false");
    if (told.error) { foot.className = "problem"; foot.textContent = told.error; return; }
    const all = tokens + (told.finished === "length" ? 1 : 0);  // the last token comes with the end
    foot.textContent = `${ends[told.finished] ?? told.finished} after ${all} ${all === 1 ? "token" : "tokens"}`;
    if (column.asked.startsWith("registry:")) foot.append(". ", link(`#adapters/${column.name.split("@")[0]}`, "Its versions"));
  };
  return { node, take };
}

export const page = {
  address: "ask",
  title: "Ask",
  notice: "One prompt, answered by the base and by several adapters side by side, together in the steps of one engine.",
  show,
};
