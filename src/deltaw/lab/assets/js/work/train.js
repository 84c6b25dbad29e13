// Compose a recipe: rows, a method, settings; the plan follows; start it.

import { chart, css } from "../charts.js";
import { blame, inputOf, recipeOf, section, valuesOf } from "./form.js";
import { ask, button, field, make, post, table, teller } from "./ui.js";

const { Plot } = globalThis;
const WAIT_MS = 250;
const FILES = ["data.train", "data.valid"];

// What is composed stays while other pages are looked at.
const draft = { method: "lora", values: new Map(), name: "" };

const gb = (bytes) => `${(bytes / 1e9).toFixed(bytes < 1e7 ? 4 : 2)} GB`;

async function show(root, rest, query) {
  const [form, kept, runs] = await Promise.all([ask("train/form"), ask("data"), ask("runs")]);
  if (!root.isConnected) return undefined; // the page was left meanwhile
  const taken = new Set(runs.runs.map((run) => run.name));
  const methods = new Map(form.methods.map((m) => [m.name, m]));
  if (query.get("from")) await takeOver(query.get("from"), form);
  if (!draft.values.has("base.path")) draft.values.set("base.path", form.base);

  const parts = make("div", { class: "compose" });
  const ofMethod = make("div");
  const plan = planned(form, taken);
  const changed = () => plan.later();

  const drawMethod = () => {
    const one = methods.get(draft.method);
    const known = new Set([...one.fields, ...one.shared].map((f) => f.path));
    for (const path of [...draft.values.keys()]) if (path.startsWith("adapter.") && !known.has(path)) draft.values.delete(path);
    const part = [section("Where it sits, and what else trains", "", one.shared, draft.values, changed)];
    if (one.fields.length) part.unshift(make("div", { class: "fields" }, ...one.fields.map((f) => inputOf(f, draft.values, changed))));
    else part.unshift(make("p", { class: "about" }, "This method has no settings of its own."));
    ofMethod.replaceChildren(...part);
  };
  const select = make("select", { name: "adapter.method" });
  for (const name of methods.keys()) select.add(new Option(name, name, false, name === draft.method));
  select.addEventListener("change", () => {
    draft.method = select.value;
    drawMethod();
    plan.method();
    changed();
  });
  drawMethod();

  const sections = form.sections.map((part) => [part, part.fields.filter((f) => !FILES.includes(f.path))])
    .map(([part, fields]) => section(part.title, part.about, fields, draft.values, changed, part.path === "base" && fields.some((f) => f.required && !draft.values.has(f.path))));
  parts.append(rows(kept, changed), make("h2", {}, "2. Method"),
    field("method", "method", select, "What is trained beside the frozen base. Its own settings follow."), ofMethod,
    make("h2", {}, "3. Settings"), make("p", { class: "about" }, "All have defaults. What you change is marked, and is all that the recipe says."), ...sections);
  root.append(make("div", { class: "train" }, parts, plan.node));
  plan.form = parts;
  plan.later(0);
  addEventListener("redraw", plan.redraw);
  return () => { removeEventListener("redraw", plan.redraw); plan.leave(); };
}

async function takeOver(name, form) {
  const run = await ask(`runs/${encodeURIComponent(name)}`);
  draft.method = run.given.adapter?.method ?? "lora";
  const fields = [...form.sections, ...form.methods.filter((m) => m.name === draft.method)].flatMap((p) => [...p.fields, ...(p.shared ?? [])]);
  draft.values = valuesOf(run.given, new Set(fields.map((f) => f.path)));
  draft.name = "";
}

// Rows to train on and to validate with: files that are kept, and new ones.
function rows(kept, changed) {
  const say = teller();
  const first = make("div", { class: "shown" });
  const choose = (path, label, none, hint) => {
    const select = make("select", { name: path });
    select.addEventListener("change", () => {
      if (select.value) draft.values.set(path, select.value);
      else draft.values.delete(path);
      changed();
    });
    const fill = (files) => {
      const here = draft.values.get(path) ?? "";
      select.replaceChildren(new Option(none, "", false, !here));
      for (const f of files) select.add(new Option(`${f.name} (${f.rows.toLocaleString("en")} rows)`, f.path, false, f.path === here));
      if (here && !files.some((f) => f.path === here)) select.add(new Option(here, here, false, true));
    };
    fill(kept.files);
    const box = field(path.replace(".", "-"), label, select, hint);
    box.append(make("small", { id: `${select.id}-wrong`, class: "wrong" }));
    return { box, fill };
  };
  const train = choose("data.train", "rows to learn", "choose a file", "");
  const valid = choose("data.valid", "rows to validate with (optional)", "none", "They are not learned; their loss tells when to stop.");
  const file = make("input", { type: "file", accept: ".jsonl,.ndjson,application/jsonl" });
  file.addEventListener("change", async () => {
    const given = file.files[0];
    if (!given) return;
    say(`Reading ${given.name} ...`);
    first.replaceChildren();
    try {
      if (given.size > kept.most_bytes) throw new Error(`${given.name} has ${(given.size / 1e6).toFixed(0)} MB, and ${kept.most_bytes / 1e6} MB is the most. Put it into ${kept.folder}.`);
      const made = await post("data", { name: keptAs(given.name), text: await textOf(given) });
      const now = await ask("data");
      if (!draft.values.has("data.train")) draft.values.set("data.train", made.path);
      train.fill(now.files);
      valid.fill(now.files);
      say(`${made.name} is kept: ${made.rows.toLocaleString("en")} rows. The first ones:`);
      first.replaceChildren(make("pre", { tabindex: "0" }, made.shown.map((row) => JSON.stringify(row)).join("\n")));
      changed();
    } catch (problem) {
      say.problem(problem);
    }
    file.value = "";
  });
  const upload = field("upload", "give a new file", file,
    `JSON Lines, one row a line: {"prompt": ..., "completion": ...}, {"messages": [...]} or {"text": ...}. It is kept in ${kept.folder}.`);
  return make("section", { "aria-label": "Rows" }, make("h2", {}, "1. Rows"),
    make("div", { class: "fields" }, train.box, valid.box, upload), say.node, first);
}

// The name under which a file is kept: "My rows (1).ndjson" is My-rows-1.jsonl.
function keptAs(name) {
  const bare = name.replace(/\.(jsonl|ndjson|json|txt)$/i, "").replace(/[^A-Za-z0-9._-]+/g, "-").replace(/^[._-]+|-+$/g, "");
  return `${bare || "rows"}.jsonl`;
}

// A file's text. What is not UTF-8 is refused: read anyway, its letters would be lost.
async function textOf(file) {
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
  } catch (problem) {
    if (!(problem instanceof TypeError)) throw new Error(`${file.name} cannot be read: ${problem.message}`);
    throw new Error(`${file.name} is not UTF-8: save it as UTF-8, and give it again.`);
  }
}

// The plan of what is composed; one question at a time, the last one wins.
function planned(form, taken) {
  const verdict = make("p", { class: "verdict", role: "status" }, "Planning ...");
  const counts = make("p", { class: "about" });
  const drawing = make("div");
  const causes = make("div");
  const yaml = make("pre", { tabindex: "0", "aria-label": "The recipe" });
  const command = make("pre", { tabindex: "0", "aria-label": "The command" });
  const say = teller();
  const name = make("input", { type: "text", name: "name", autocomplete: "off", spellcheck: "false" });
  const start = button("Start", begin, { class: "main" });
  const copy = button("Copy the recipe", async () => {
    try {
      await navigator.clipboard.writeText(yaml.textContent);
      say("The recipe is on the clipboard.");
    } catch { say.problem(new Error("The browser gives no clipboard here: mark the recipe below and copy it.")); }
  });
  const free = () => {
    for (let n = 1; ; n += 1) if (!taken.has(`${draft.method}-${n}`)) return `${draft.method}-${n}`;
  };
  name.value = draft.name || free();
  name.addEventListener("input", () => { draft.name = name.value; tell(); });
  const node = make("aside", { class: "plan", "aria-label": "Plan" }, make("h2", {}, "Plan"), verdict, counts, drawing,
    make("details", {}, make("summary", {}, "Bytes by cause"), causes),
    make("h2", {}, "Start"), field("name", "name of the run", name, `It is written to ${form.runs}/NAME.`), make("div", { class: "row" }, start), say.node,
    make("details", { open: "" }, make("summary", {}, "The same in a terminal"), yaml, command, copy));
  const self = { node, form: null, later, redraw, leave: () => { gone = true; clearTimeout(timer); }, method: () => { if (!draft.name) name.value = free(); } };
  let timer = 0;
  let busy = false;
  let again = false;
  let gone = false;
  let last = null;

  const tell = () => { command.textContent = `deltaw train ${name.value || "NAME"}.yaml --out ${form.runs}/${name.value || "NAME"}`; };

  function later(ms = WAIT_MS) {
    clearTimeout(timer);
    document.body.setAttribute("aria-busy", "true");
    timer = setTimeout(update, ms);
  }

  async function update() {
    if (busy) { again = true; return; }
    busy = true;
    tell();
    const slow = setTimeout(() => node.classList.add("waiting"), 300);
    try {
      last = await post("train/plan", { recipe: recipeOf(draft.method, draft.values) });
      blame(self.form);
    } catch (problem) {
      last = { problem, yaml: problem.body?.yaml };
      blame(self.form, problem.body?.fields, problem.message);
    }
    clearTimeout(slow);
    busy = false;
    if (gone) return;
    if (again) { again = false; update(); return; }
    node.classList.remove("waiting");
    redraw();
    document.body.setAttribute("aria-busy", "false");
  }

  function redraw() {
    if (!last) return;
    if (last.yaml) yaml.textContent = last.yaml;
    const bad = Boolean(last.problem);
    const rows = draft.values.has("data.train");
    start.disabled = bad || !rows;
    const state = bad || last.fits === false ? "no" : last.fits ? "yes" : "unknown";
    node.dataset.fits = state;
    verdict.replaceChildren(make("strong", {}, bad ? "This cannot be trained. " : { yes: "It fits. ", no: "It does not fit. ", unknown: "" }[state]),
      bad ? last.problem.message : last.why);
    const p = bad ? null : last.plan;
    counts.textContent = p ? `${p.settings.adapter.method} trains ${p.trainable.toLocaleString("en")} numbers (${p.trainable_percent.toPrecision(3)} % of the base's), `
      + `with learning rate ${last.lr}. A step is ${p.settings.rows} rows, ${p.settings.tokens.toLocaleString("en")} tokens${last.assumed ? "; rows of 512 tokens are assumed until a file is chosen" : ""}.`
      : "";
    drawing.replaceChildren(...(p ? [bars(p)] : []));
    causes.replaceChildren(...(p ? [table(`Bytes at the peak (${p.peak_moment})`,
      [["cause", (r) => r[0]], ["bytes", (r) => r[1].toLocaleString("en"), "number"]], [...Object.entries(p.bytes), ["together", p.peak_bytes]])] : []));
    if (!rows && !bad) say("Choose rows to learn, and it can start.");
    else say();
  }

  async function begin() {
    start.disabled = true;
    say("Starting ...");
    try {
      const run = await post("runs", { name: name.value, recipe: recipeOf(draft.method, draft.values) });
      draft.name = "";
      if (!gone) location.hash = `#runs/${run.name}`;
    } catch (problem) {
      say.problem(problem);
      start.disabled = false;
    }
  }
  return self;
}

function bars(plan) {
  const causes = Object.entries(plan.bytes).filter(([, bytes]) => bytes > 0).map(([cause, bytes]) => ({ cause, bytes }));
  return chart(`Memory at the peak, ${gb(plan.peak_bytes)}: ${causes.map((c) => `${c.cause} ${gb(c.bytes)}`).join(", ")}`, {
    width: 340, height: 28 * causes.length + 40, marginLeft: 92, marginRight: 66, marginBottom: 34, x: { label: "GB", ticks: 4, labelOffset: 32, domain: [0, Math.max(...causes.map((c) => c.bytes)) / 1e9] },
    y: { label: null, domain: causes.map((c) => c.cause) },
    marks: [Plot.barX(causes, { y: "cause", x: (d) => d.bytes / 1e9, fill: css("blue"), insetTop: 3, insetBottom: 3 }),
      Plot.text(causes, { y: "cause", x: (d) => d.bytes / 1e9, text: (d) => gb(d.bytes), textAnchor: "start", dx: 4 })],
  });
}

export const page = { address: "train", title: "Train", notice: "Choose rows and a method; the plan says what it takes before it starts.", show };
