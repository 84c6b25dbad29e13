// Runs over each other: curves, settings that differ, final numbers.

import { curves, LOOKS } from "./curves.js";
import { ask, link, make, table } from "./ui.js";

const AXES = { step: "steps", tokens: "tokens", seconds: "seconds" };
const number = (value, digits = 4) => (value === null || value === undefined ? "" : Number(value).toPrecision(digits));

async function show(root, rest, query) {
  const names = (query.get("runs") ?? "").split(",").filter(Boolean);
  const every = (await ask("runs")).runs.map((run) => run.name);
  const address = (chosen, by) => `#compare?${new URLSearchParams({ runs: chosen.join(","), by })}`;
  let by = query.get("by") in AXES ? query.get("by") : "step";
  const picks = every.map((name) => {
    const input = make("input", { type: "checkbox", id: `run-${name}` });
    input.checked = names.includes(name);
    input.addEventListener("change", () => {
      location.hash = address(input.checked ? [...names, name] : names.filter((n) => n !== name), by);
    });
    return make("span", { class: "pick" }, input, make("label", { for: `run-${name}` }, name));
  });
  root.append(make("fieldset", {}, make("legend", {}, "runs"), ...(picks.length ? picks : ["There are none yet. ", link("#train", "Compose one")])));
  if (!names.length) {
    root.append(make("p", {}, "Choose two or more."));
    return undefined;
  }
  const found = await ask(`compare?runs=${names.map(encodeURIComponent).join(",")}`);
  const drawing = make("div", { class: "curves" });
  const select = make("select", { id: "by" });
  for (const [key, label] of Object.entries(AXES)) select.add(new Option(label, key, false, key === by));
  const lines = (kind, y) => found.runs.map((run, i) => ({ name: run.name, points: run[kind].map((p) => ({ ...p, [y]: p[y] ?? NaN })), y, look: LOOKS[i], dots: kind === "evals" || y === "growth" }));
  const draw = () => {
    const width = Math.max(280, Math.min(560, drawing.clientWidth));
    const percent = lines("steps", "growth").map((l) => ({ ...l, points: l.points.map((p) => ({ ...p, growth: 100 * p.growth })) }));
    drawing.replaceChildren(curves("Loss of what is learned", lines("steps", "loss"), { x: by, width, height: 260 }),
      ...(found.runs.some((r) => r.evals.length) ? [curves("Validation", lines("evals", "value"), { x: by, width, height: 260 })] : []),
      curves("How far the weights have moved: |dW| / |W|", percent, { x: by, width, unit: "%", zero: true }),
      curves("Tokens per second", lines("steps", "tokens_per_s"), { x: by, width, zero: true }));
  };
  select.addEventListener("change", () => { by = select.value; history.replaceState(null, "", address(names, by)); draw(); });
  const cell = (value) => (value === null || value === undefined ? "none" : typeof value === "object" ? JSON.stringify(value) : String(value));
  root.append(make("div", { class: "row" }, make("label", { for: "by" }, "against"), select), drawing,
    table("Final numbers", [["run", (r) => link(`#runs/${encodeURIComponent(r.name)}`, r.name)], ["method", (r) => r.method],
      ["step", (r) => String(r.step), "number"], ["loss", (r) => number(r.loss), "number"], ["best", (r) => (r.best === null ? "" : `${number(r.best)} (${r.metric})`), "number"],
      ["trains", (r) => r.parameters?.toLocaleString("en"), "number"], ["|dW| / |W|", (r) => (r.growth === null ? "" : `${(100 * r.growth).toPrecision(2)} %`), "number"],
      ["tokens", (r) => r.tokens.toLocaleString("en"), "number"], ["seconds", (r) => number(r.seconds, 4), "number"],
      ["peak GB", (r) => (r.peak_rss_mb === null ? "" : (r.peak_rss_mb / 1000).toFixed(2)), "number"]], found.runs));
  if (found.differ.length) {
    root.append(table("Settings that differ", [["setting", (d) => d.key], ...found.runs.map((run, i) => [run.name, (d) => cell(d.values[i])])], found.differ));
  } else root.append(make("p", {}, names.length > 1 ? "No setting differs." : "Choose another run beside it."));
  draw();
  addEventListener("redraw", draw);
  return () => removeEventListener("redraw", draw);
}

export const page = { address: "compare", title: "Compare", notice: "Runs over each other: what was set differently, and what came of it.", show };
