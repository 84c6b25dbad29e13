// All runs, and one run while it trains.

import { curves, one, two } from "./curves.js";
import { ask, button, link, make, post, stream, table, teller } from "./ui.js";

const SIGNS = { running: "\u25b6 running", waiting: "\u2026 waiting", done: "\u2713 done", stopped: "\u25a0 stopped", failed: "\u2717 failed" };
const number = (value, digits = 4) => (value === null || value === undefined ? "" : Number(value).toPrecision(digits));
const share = (value) => (value === null || value === undefined ? "" : `${(100 * value).toPrecision(2)} %`);
const address = (name) => `#runs/${encodeURIComponent(name)}`;
const seconds = (s) => (s < 90 ? `${s.toFixed(1)} s` : s < 5400 ? `${(s / 60).toFixed(1)} min` : `${(s / 3600).toFixed(1)} h`);

async function list(root) {
  const chosen = new Set();
  const box = make("div");
  const say = teller();
  const compare = button("Compare the chosen", () => { location.hash = `#compare?runs=${[...chosen].map(encodeURIComponent).join(",")}`; }, { class: "main" });
  const tell = () => { compare.disabled = chosen.size < 2; };
  root.append(make("div", { class: "row" }, link("#train", "Compose a new run"), compare), say.node, box);
  let shown = "";

  const draw = (found) => {
    const text = JSON.stringify(found);
    if (text === shown) return;
    shown = text;
    if (!found.runs.length) {
      box.replaceChildren(make("p", {}, `There are no runs in ${found.folder} yet. `, link("#train", "Compose one"), ", or train there in a terminal."));
      return;
    }
    const focused = document.activeElement?.id;
    const tick = (run) => {
      const input = make("input", { type: "checkbox", id: `choose-${run.name}`, "aria-label": `compare ${run.name}` });
      input.checked = chosen.has(run.name);
      input.addEventListener("change", () => { chosen[input.checked ? "add" : "delete"](run.name); tell(); });
      return input;
    };
    box.replaceChildren(table(`Runs in ${found.folder}`, [
      ["", tick], ["run", (r) => link(address(r.name), r.name)],
      ["state", (r) => make("span", { class: `state ${r.state}`, title: r.sentence || null }, SIGNS[r.state])],
      ["method", (r) => r.method], ["base", (r) => r.base], ["step", (r) => `${r.step}${r.n_steps ? ` of ${r.n_steps}` : ""}`, "number"],
      ["loss", (r) => number(r.loss), "number"], ["best", (r) => (r.best === null ? "" : `${number(r.best)} (${r.metric})`), "number"],
      ["|dW| / |W|", (r) => share(r.growth), "number"], ["tokens/s", (r) => number(r.tokens_per_s, 3), "number"], ["time", (r) => seconds(r.seconds), "number"],
    ], found.runs));
    if (focused) document.getElementById(focused)?.focus();
  };
  const look = async () => {
    try { draw(await ask("runs")); say(); } catch (problem) { say.problem(problem); }
  };
  tell();
  await look();
  const timer = setInterval(look, 2000);
  return () => clearInterval(timer);
}

async function single(root, name) {
  const path = `runs/${encodeURIComponent(name)}`;
  document.getElementById("title").textContent = `Run ${name}`; // before it waits: by then another page may be there
  document.title = `${name} - deltaw lab`;
  let run = await ask(path);
  const state = make("p", { class: "verdict", role: "status" });
  const line = teller();
  const bar = make("progress", { "aria-label": "Steps done" });
  const numbers = make("dl", { class: "live" });
  const drawing = make("div", { class: "curves" });
  const found = { steps: [], evals: [] };
  let start = null;
  let gone = false;
  let timer = 0;

  const act = (label, what) => button(label, async () => {
    line(what === "stop" ? "It ends after the present step, and keeps it." : "");
    try { await post(`${path}/${what}`); } catch (problem) { line.problem(problem); }
  });
  const stop = act("Stop", "stop");
  const resume = act("Resume", "resume");
  const next = make("div", { class: "row" }, stop, resume, link(`#compare?runs=${encodeURIComponent(name)}`, "Compare"),
    ...(run.given ? [link(`#train?from=${encodeURIComponent(name)}`, "Compose another like it")] : []));
  const after = make("span", { class: "row" });
  next.append(after);

  const later = () => { if (!timer) timer = setTimeout(() => { timer = 0; if (!gone) draw(); }, 250); };
  function draw() {
    const at = found.steps.at(-1);
    const total = start?.n_steps ?? run.n_steps;
    state.replaceChildren(make("strong", { class: `state ${run.state}` }, SIGNS[run.state]), run.sentence ? ` ${run.sentence}` : "");
    stop.hidden = !["running", "waiting"].includes(run.state);
    resume.hidden = !(["stopped", "failed"].includes(run.state) && run.mine);
    bar.max = total ?? 1;
    bar.value = at?.step ?? 0;
    bar.hidden = !total;
    const grown = found.steps.findLast((p) => p.growth !== null && p.growth !== undefined);
    const told = [["step", total ? `${at?.step ?? 0} of ${total}` : `${at?.step ?? 0}`], ["loss", number(at?.loss)],
      [`validation (${run.metric})`, number(found.evals.at(-1)?.value)], ["|dW| / |W|", share(grown?.growth)],
      ["tokens/s", number(at?.tokens_per_s, 3)], ["peak memory", at?.peak_rss_mb ? `${(at.peak_rss_mb / 1000).toFixed(2)} GB` : ""],
      ["trains", start ? start.parameters.toLocaleString("en") : ""], ["time", seconds(at?.seconds ?? 0)]].filter(([, value]) => value !== "");
    numbers.replaceChildren(...told.map(([key, value]) => make("div", {}, make("dt", {}, key), make("dd", {}, value))));
    const wide = Math.max(280, Math.min(560, drawing.clientWidth));
    const lines = [{ name: "learned", points: found.steps, y: "loss", look: one() }];
    if (run.metric === "loss") lines.push({ name: "validation", points: found.evals, y: "value", look: two(), dots: true });
    const more = (title, y, unit, scale = (v) => v) => curves(title,
      [{ name: title, points: found.steps.filter((p) => p[y] !== null && p[y] !== undefined).map((p) => ({ ...p, [y]: scale(p[y]) })), y, look: one(), dots: y === "growth" }], { unit, height: 170, width: wide, zero: y !== "lr" });
    drawing.replaceChildren(curves("Loss", lines, { width: wide, height: 230 }),
      ...(run.metric !== "loss" && found.evals.length ? [curves(`Validation: ${run.metric}`, [{ name: run.metric, points: found.evals, y: "value", look: two(), dots: true }], { width: wide })] : []),
      more("How far the weights have moved: |dW| / |W|", "growth", "%", (v) => 100 * v), more("Tokens per second", "tokens_per_s", ""),
      more("Peak memory of the process", "peak_rss_mb", "GB", (v) => v / 1000), more("Learning rate", "lr", ""));
  }

  let tokens = 0;
  let time = 0;
  function take(e) {
    if (e.event === "again") { found.steps.length = found.evals.length = tokens = time = 0; }
    else if (e.event === "state") { run = { ...run, ...e }; refresh(); }
    else if (e.event === "start") start = e;
    else if (e.event === "step" || e.event === "eval") {
      tokens += e.tokens ?? 0;
      time += e.seconds;
      found[e.event === "step" ? "steps" : "evals"].push({ ...e, tokens, seconds: time });
    }
    later();
  }
  // What a finished step of a run changes beside its curves: where the result lies.
  async function refresh() {
    const now = await ask(path).catch(() => null);
    if (!now || gone) return;
    run = { ...now, state: run.state, sentence: run.sentence };
    after.replaceChildren(...(run.result ? [link(`#diagnose?run=${encodeURIComponent(name)}`, "Diagnose"),
      ...(run.result.endsWith("adapter") ? [link(`#adapters?add=${encodeURIComponent(name)}`, "Add to the registry")] : [])] : []));
    later();
  }

  root.append(state, bar, next, line.node, numbers, drawing,
    make("details", {}, make("summary", {}, "Recipe and command"), make("pre", { tabindex: "0" }, run.recipe), make("pre", { tabindex: "0" }, run.command)));
  draw();
  await refresh();
  const close = stream(`${path}/events`, take, (now) => { if (now === "lost") line("The lab does not answer; trying again."); else if (line.node.textContent.startsWith("The lab")) line(); });
  addEventListener("redraw", later);
  return () => { gone = true; clearTimeout(timer); close(); removeEventListener("redraw", later); };
}

export const page = {
  address: "runs", title: "Runs", notice: "What is trained here, live.",
  show: (root, rest) => (rest ? single(root, rest) : list(root)),
};
