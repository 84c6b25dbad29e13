// Methods and memory compared, from the rows that the bench kept.

import { css, legend } from "../charts.js";
import { ask, field, make } from "./ui.js";
import { Plot, again, count, d3, drawn, megabytes, value } from "./show.js";

const FAMILY = (m) => (m.mergeable === "is a model" ? "the whole model" : m.mergeable === "yes" ? "merges into the weights" : "stays beside them");
const FAMILIES = ["merges into the weights", "stays beside them", "the whole model"];
const CAUSES = ["runtime", "weights", "constants", "adapter", "gradients", "optimizer", "activations", "logits", "workspace", "allocator", "file"];

const first = (m, name, task) => m[name]?.[task] ?? null;
const COSTS = {
  percent: ["share of the parameters that trains, %", (m) => m.percent, true],
  memory: ["peak memory of the training, MB", (m) => m.peak_mb, false],
  seconds: ["seconds of the training", (m, task) => m.seconds?.[task] ?? Object.values(m.seconds ?? {})[0], false],
  file: ["size of the file, MB", (m) => m.file_mb, true],
  forgetting: ["perplexity of Wikipedia afterwards (lower has forgotten less)", (m, task) => first(m, "wiki", task), true],
};

// A table whose heads are buttons that sort it.
function sortable(caption, columns, rows) {
  let by = null;
  let down = false;
  const body = make("tbody", {});
  const heads = columns.map(([title, , key, kind]) => {
    const head = make("th", { scope: "col", class: kind, "aria-sort": "none" });
    if (key) {
      const sort = make("button", { type: "button", class: "sort" }, title);
      sort.addEventListener("click", () => { down = by === head ? !down : kind === "number"; by = head; fill(key); });
      head.append(sort);
    } else head.append(title);
    return head;
  });
  function fill(key) {
    const known = (r) => key(r) !== null && key(r) !== undefined && key(r) !== "";
    const sorted = key ? [...rows].sort((a, b) => (known(a) ? 0 : 1) - (known(b) ? 0 : 1) || (down ? d3.descending : d3.ascending)(key(a), key(b))) : rows;
    for (const head of heads) head.setAttribute("aria-sort", head !== by ? "none" : down ? "descending" : "ascending");
    body.replaceChildren(...sorted.map((row) => make("tr", {}, ...columns.map(([, cell, , kind], i) => make(i ? "td" : "th", { class: kind, scope: i ? null : "row" }, cell(row) ?? "")))));
  }
  fill(null);
  return make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption }, make("table", {}, make("caption", {}, `${caption} (press a head to sort)`), make("thead", {}, make("tr", {}, ...heads)), body));
}

const spread = (e) => (e ? `${e.mean.toFixed(3)}${e.deviation === null ? "" : ` \u00b1 ${e.deviation.toFixed(3)}`}` : "");

function source(s, more = "") {
  const dates = s.first === null ? "the rows keep no date" : s.first === s.last ? s.first : `${s.first} to ${s.last}`;
  return `${s.script}: ${s.machines.join("; ")}; torch ${s.torch.join(", ")}; ${dates}${more}.`;
}

async function show(root, rest, query) {
  const told = await ask("tables");
  const pick = (id, label, options, chosen) => {
    const select = make("select", {});
    for (const [key, text] of options) select.add(new Option(text, key, false, key === chosen));
    return [select, field(id, label, select)];
  };
  const [task, taskField] = pick("task", "Task", told.tasks.map((t) => [t, t]), query.get("task") ?? told.tasks[0]);
  const [cost, costField] = pick("cost", "Against", Object.entries(COSTS).map(([k, [t]]) => [k, t]), query.get("cost") ?? "percent");
  root.append(make("h2", {}, "Methods"), make("p", {}, "Measured with SmolLM2-135M-Instruct, each method with its default settings. Higher and further to the left is better."), make("div", { class: "line" }, taskField, costField));
  const chart = scatter(root, told, task, cost);
  const turn = () => { history.replaceState(null, "", `#tables?${new URLSearchParams({ task: task.value, cost: cost.value })}`); chart(); };
  task.addEventListener("change", turn);
  cost.addEventListener("change", turn);
  root.append(legend(FAMILIES.map((f, i) => [f, familyColours()[i]])), methods(told),
    make("p", { class: "soft" }, "Accuracy, general questions and perplexity: ", source(told.quality_source, `; ${count(told.quality_source.tokens)} tokens of training, ${told.quality_source.rows} unseen rows; mean and standard deviation over seeds`)),
    make("p", { class: "soft" }, "Seconds, memory and file: ", source(told.cost_source, `; ${count(told.cost_source.tokens)} tokens of training`)));
  for (const { study, rows } of told.studies) {
    root.append(make("h2", {}, study === "ranks" ? "Ranks of LoRA" : "Which maps, for one budget"), sortable(study === "ranks" ? "LoRA by rank" : "LoRA by targets", [
      [study.replace(/s$/, ""), (r) => r.label, null], ["trains", (r) => count(r.trainable), (r) => r.trainable, "number"],
      ...told.tasks.map((t) => [t, (r) => spread(r.exact[t]), (r) => r.exact[t]?.mean, "number"]), ["wiki perplexity", (r) => pair(r.wiki, told), (r) => r.wiki[told.tasks[0]], "number"]], rows));
  }
  const bars = memory(root, told);
  return again([chart, bars]);
}

const pair = (found, told) => told.tasks.map((t) => found[t]).filter((v) => v !== null).map((v) => (v < 1 ? v.toFixed(3) : v.toFixed(1))).join(", ");
const familyColours = () => [css("blue"), css("orange"), css("grey")];

function scatter(root, told, task, cost) {
  const rows = told.methods.filter((m) => m.label !== "base");
  const picture = () => {
    const [, of, log] = COSTS[cost.value];
    return rows.map((m) => ({ label: m.label, family: FAMILY(m), x: of(m, task.value), log, ...m.exact[task.value] })).filter((p) => p.x && p.mean !== undefined);
  };
  return drawn(root, "Accuracy on unseen rows, against what it costs.", "The line through a mark is one standard deviation over seeds.", "Accuracy of each method against its cost; the table below has the numbers", (width) => {
    const points = picture();
    const [title, , log] = COSTS[cost.value];
    const names = nudged(points, log, width);
    return {
      height: 380, marginRight: 54, marginLeft: 50, x: { type: log ? "log" : "linear", label: title, grid: true, ticks: width < 500 ? 3 : 5, tickFormat: log ? (v) => value(v) : d3.format("~s"), nice: true }, y: { label: `exact matches, ${task.value}`, grid: true, domain: [Math.max(0, d3.min(points, (p) => p.mean) - 0.06), Math.min(1, d3.max(points, (p) => p.mean + (p.deviation ?? 0)) + 0.03)] },
      color: { domain: FAMILIES, range: familyColours() }, symbol: { domain: FAMILIES, range: ["circle", "triangle", "square"] },
      marks: [Plot.ruleX(points.filter((p) => p.deviation), { x: "x", y1: (p) => p.mean - p.deviation, y2: (p) => p.mean + p.deviation, stroke: "family", strokeWidth: 1.5, clip: true }),
        Plot.dot(points, { x: "x", y: "mean", fill: "family", symbol: "family", r: 5.5, stroke: css("page") }),
        ...names.map((p) => Plot.text([p], { x: "x", y: "mean", text: "label", dx: 8, dy: p.dy, textAnchor: "start", fontSize: 12, stroke: css("page"), fill: css("text") }))],
    };
  });
}

// Names beside their marks, moved up or down where they would lie on one another.
function nudged(points, log, width) {
  const at = (p) => (log ? Math.log(p.x) : p.x);
  const [x0, x1] = d3.extent(points, at);
  const [y0, y1] = d3.extent(points, (p) => p.mean);
  const placed = [];
  for (const p of d3.sort(points, (a) => -a.mean)) {
    const x = ((at(p) - x0) / (x1 - x0 || 1)) * (width - 104);
    const y = (1 - (p.mean - y0) / (y1 - y0 || 1)) * 290;
    let dy = 0;
    while (placed.some((q) => Math.abs(q.x - x) < 62 && Math.abs(q.y - (y + dy)) < 13)) dy += 4;
    placed.push({ x, y: y + dy });
    p.dy = dy;
  }
  return points;
}

function methods(told) {
  const [a, b] = told.tasks;
  return sortable("Every method", [
    ["method", (m) => m.label, (m) => m.label],
    ["trains", (m) => (m.percent ? `${Number(m.percent.toPrecision(3))} %` : ""), (m) => m.percent, "number"],
    [a, (m) => spread(m.exact[a]), (m) => m.exact[a]?.mean, "number"],
    [b, (m) => spread(m.exact[b]), (m) => m.exact[b]?.mean, "number"],
    ["general questions", (m) => pair(m.general, told), (m) => first(m, "general", a), "number"],
    ["wiki perplexity", (m) => pair(m.wiki, told), (m) => first(m, "wiki", a), "number"],
    ["seconds", (m) => Object.values(m.seconds ?? {}).map((s) => s.toFixed(0)).join(", "), (m) => m.seconds?.[a], "number"],
    ["peak memory", (m) => (m.peak_mb ? `${count(Math.round(m.peak_mb))} MB` : ""), (m) => m.peak_mb, "number"],
    ["file", (m) => (m.file_mb ? `${Number(m.file_mb.toPrecision(3))} MB` : ""), (m) => m.file_mb, "number"],
    ["merges", (m) => m.mergeable ?? "", (m) => m.mergeable],
  ], told.methods);
}

function memory(root, told) {
  root.append(make("h2", {}, "Memory: planned and measured"), make("p", {}, "Peaks of real training steps, each in a process of its own, beside what deltaw plan had said of them."));
  const rows = told.memory.map((m) => ({ ...m, error: (m.planned - m.measured) / m.measured }));
  const kinds = CAUSES.filter((c) => rows.some((r) => r.causes[c]));
  const colour = () => ["#7d848e", "#1f5fa8", "#4d4d9f", "#d55e00", "#cc79a7", "#009e73", "#e69f00", "#56b4e9", "#a6761d", "#b8bcc4", "#f0e442"];
  const parts = rows.flatMap((r) => kinds.filter((c) => r.causes[c]).map((cause) => ({ label: r.label, cause, gb: r.causes[cause] / 1e9 })));
  const short = (label) => label.replace("smollm2-135m-instruct", "135M").replace("smollm2-360m", "360M").replace("bfloat16", "bf16").replace("float32", "fp32").replace("checkpointing", "ckpt").replace("micro_tokens=", "micro ");
  const draw = drawn(root, "Planned peak by cause; the diamond is what was measured.", "", "Planned and measured peaks of training; the table below has the numbers", (width) => ({
    height: 40 + (width > 600 ? 24 : 38) * rows.length, marginLeft: width > 600 ? 325 : 12, marginTop: 8, x: { label: "GB", grid: true }, y: { type: "band", domain: rows.map((r) => r.label), label: null, axis: width > 600 ? "left" : null, tickFormat: short, padding: width > 600 ? 0.25 : 0.1 },
    color: { domain: kinds, range: colour() },
    marks: [Plot.barX(parts, { y: "label", x: "gb", fill: "cause", insetTop: width > 600 ? 0 : 18 }), Plot.dot(rows, { y: "label", x: (r) => r.measured / 1e9, symbol: "diamond", r: 6, fill: css("text"), stroke: css("page"), dy: width > 600 ? 0 : 9 }),
      ...(width > 600 ? [] : [Plot.text(rows, { y: "label", x: 0, text: (r) => short(r.label), textAnchor: "start", fontSize: 11, dy: -9 })])],
  }));
  root.append(legend(kinds.map((k, i) => [k, colour()[i]])), sortable("Planned and measured peaks", [
    ["configuration", (r) => r.label, (r) => r.label], ["planned", (r) => megabytes(r.planned), (r) => r.planned, "number"], ["measured", (r) => megabytes(r.measured), (r) => r.measured, "number"],
    ["error", (r) => `${(100 * r.error).toFixed(1)} %`, (r) => Math.abs(r.error), "number"]], rows), make("p", { class: "soft" }, source(told.memory_source)));
  return draw;
}

export const page = {
  address: "tables",
  title: "Tables",
  notice: "What methods give and cost, and what memory goes into: the rows of this project's own bench.",
  show,
};
