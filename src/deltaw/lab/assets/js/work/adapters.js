// The registry: every name; one name with its versions, lineage, differences and audit trail; adding a run's adapter.

import { css } from "../charts.js";
import { ask, button, field, link, make, post, table, teller } from "./ui.js";
import { Plot, again, brief, confirmed, count, day, drawn, megabytes, metrics, value } from "./show.js";

const tags = (labels) => make("span", {}, ...labels.map((label) => make("span", { class: `tag${label === "current" ? " on" : ""}` }, label)));
const origin = (parents) => make("span", {}, ...parents.flatMap((p, i) => [i ? "; " : "", `${p.how} `,
  p.names.length ? link(`#adapters/${p.names[0].split("@")[0]}`, p.names[0]) : `${p.id.slice(0, 12)} (not here)`]));

// All names -----------------------------------------------------------------------------------------

async function names(root, query) {
  const say = teller();
  const search = make("input", { type: "search", maxlength: "100", value: query.get("search") ?? "" });
  const list = make("div", {});
  let page = Number(query.get("page") ?? 1);
  let mine = 0;
  root.append(make("form", { class: "line", role: "search" }, field("search", "Search names, labels, methods, bases, ids", search)), say.node, list);
  root.querySelector("form").addEventListener("submit", (event) => event.preventDefault());

  async function show() {
    const turn = ++mine;
    const asked = new URLSearchParams({ search: search.value, page: String(page) });
    const told = await ask(`adapters?${asked}`);
    if (turn !== mine || !root.isConnected) return; // a page that was left leaves the address alone
    const state = [search.value && `search=${encodeURIComponent(search.value)}`, told.page > 1 && `page=${told.page}`].filter(Boolean).join("&");
    history.replaceState(null, "", `#adapters${state ? `?${state}` : ""}`);
    list.replaceChildren(...listed(told, (n) => { page = n; show().catch(say.problem); }));
    say(told.exists && told.all ? `${count(told.total)} of ${count(told.all)} names in ${told.registry}` : "");
  }
  let late = 0;
  search.addEventListener("input", () => {
    clearTimeout(late);
    late = setTimeout(() => { page = 1; show().catch(say.problem); }, 150);
  });
  await show();
}

function listed(told, turn) {
  const run = told.runs.length ? link(`#adapters?add=${encodeURIComponent(told.runs[0])}`, "Add a run's adapter") : link("#train", "Train one");
  if (!told.exists || !told.all) {
    const why = told.exists ? "The registry is empty." : `There is no registry at ${told.registry} yet; the first adapter that is added makes it.`;
    return [make("p", { class: "empty" }, `${why} `, run, ".")];
  }
  const parts = [table("Adapters, each with its current version", [
    ["name", (r) => link(`#adapters/${r.name}`, r.name)],
    ["labels", (r) => make("span", {}, ...Object.entries(r.labels).map(([l, v]) => make("span", { class: `tag${l === "current" ? " on" : ""}` }, `${l} ${v}`)))],
    ["versions", (r) => count(r.versions), "number"],
    ["method", (r) => r.method],
    ["parameters", (r) => count(r.n_parameters), "number"],
    ["size", (r) => megabytes(r.bytes), "number"],
    ["metrics", (r) => metrics(r.metrics)],
    ["base", (r) => make("span", {}, r.base ?? "not said", r.fits === "no" ? make("span", { class: "tag no" }, "another base") : "")],
    ["lineage", (r) => origin(r.parents)],
    ["added", (r) => day(r.added)],
  ], told.rows)];
  const pages = Math.ceil(told.total / told.per_page);
  if (!told.rows.length) parts.push(make("p", {}, "No name holds all these words."));
  if (pages > 1) {
    const before = button("Earlier names", () => turn(told.page - 1));
    const after = button("Later names", () => turn(told.page + 1));
    before.disabled = told.page <= 1;
    after.disabled = told.page >= pages;
    parts.push(make("div", { class: "row" }, before, make("span", { class: "soft" }, `page ${told.page} of ${count(pages)}`), after));
  }
  parts.push(make("p", {}, run, "."));
  return parts;
}

// Adding ----------------------------------------------------------------------------------------------

async function add(root, run) {
  const told = await ask("adapters");
  const say = teller();
  if (!told.runs.length) {
    root.append(make("p", { class: "empty" }, "No run has left an adapter yet. ", link("#train", "Train one"), "."));
    return;
  }
  const which = make("select", {});
  for (const name of told.runs) which.add(new Option(name, name, false, name === run));
  const name = make("input", { type: "text", maxlength: "100", value: run.replace(/[^A-Za-z0-9._-]/g, "-") });
  const form = make("form", { class: "panel" }, field("add-run", "The run whose adapter is kept", which),
    field("add-name", "Its name in the registry", name, "Letters, digits, '.', '-' and '_'. A name that is there gets its next version."),
    make("button", { type: "submit", class: "main" }, "Add to the registry"));
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    try {
      const made = await post("adapters/add", { name: name.value, run: which.value });
      say(`${made.name}@${made.version} ${made.new ? "is" : "was already"} ${made.labels.join(", ") || "without a label"}. `);
      say.node.append(link(`#adapters/${made.name}`, `See ${made.name}`));
    } catch (problem) { say.problem(problem); }
  });
  root.append(form, say.node, make("p", {}, link("#adapters", "All adapters")));
}

// One name ----------------------------------------------------------------------------------------------

async function one(root, name) {
  const say = teller();
  const body = make("div", {});
  root.append(make("p", {}, link("#adapters", "All adapters")), make("h2", { class: "big" }, name), say.node, body);
  let leave = () => {};
  async function show() {
    const told = await ask(`adapters/${encodeURIComponent(name)}`);
    leave();
    body.replaceChildren();
    leave = draw(body, told, async (work, done) => {
      try {
        say("Working ...");
        const told = done(await work());
        await show();
        say(told);
      } catch (problem) { say.problem(problem); }
    });
  }
  await show();
  return () => leave();
}

function draw(body, told, change) {
  const current = told.labels.current;
  body.append(
    make("p", {}, current ? make("strong", {}, `Version ${current} is current: it answers when ${told.name} is asked. `) : "No version is current. ",
      ...Object.entries(told.labels).filter(([l]) => l !== "current").map(([l, v]) => `${l} is version ${v}. `)),
    make("div", { class: "row" }, button("Roll current back", () => rollback(told, change)), link(`#ask?adapters=registry:${told.name}`, "Ask it"),
      link(`#diagnose?adapter=${told.name}`, "Diagnose it")),
    make("h2", {}, "Versions"), table(`Versions of ${told.name}, the newest first`, [
      ["version", (v) => String(v.version), "number"],
      ["labels", (v) => tags(v.labels)],
      ["added", (v) => day(v.added)],
      ["metrics", (v) => metrics(v.metrics)],
      ["method, size", (v) => make("span", {}, v.method, v.full ? make("small", {}, `${count(v.n_parameters)} parameters, ${megabytes(v.bytes)}`) : "")],
      ["base", (v) => v.base ?? ""],
      ["lineage", (v) => (v.full ? origin(v.parents) : "")],
      ["gates", (v) => (v.gates ?? []).map((g) => `${g.label}: ${g.passed ? "passed" : "not passed"}, ${value(g.value)}`).join("; ")],
      ["what next", (v) => make("span", { class: "tight" }, button("Promote", () => promote(told, v, change), { "aria-label": `Promote version ${v.version}` }),
        link(`#ask?adapters=base,registry:${told.name}@${v.version}`, "ask"), link(`#diagnose?adapter=${told.name}@${v.version}`, "diagnose"))],
    ], told.versions));
  const lineage = make("div", {});
  body.append(make("h2", {}, "Lineage"), lineage);
  const leave = again([ancestry(lineage, told)]);
  body.append(make("h2", {}, "What differs"), compare(told), make("h2", {}, "Audit trail"), trail(told));
  return leave;
}

function rollback(told, change) {
  const from = told.labels.current;
  const parts = [make("p", {}, from ? `current is on version ${from} and goes back to where it was before its last move.` : "current goes back to where it was before its last move.")];
  confirmed(`Roll ${told.name} back?`, parts, "Roll back").then((yes) => yes && change(
    () => post(`adapters/${told.name}/rollback`, { label: "current" }),
    (m) => `${m.name}@${m.label} is version ${m.version} (was ${m.before ?? "none"})${m.skipped.length ? `; removed since and passed over: ${m.skipped.join(", ")}` : ""}.`));
}

function promote(told, version, change) {
  const label = make("input", { type: "text", maxlength: "32", value: "current", list: "labels-known" });
  const known = make("datalist", { id: "labels-known" }, ...Object.keys(told.labels).map((l) => make("option", { value: l })));
  const gate = make("input", { type: "checkbox" });
  const about = make("p", { class: "soft" });
  const ask_it = make("label", { class: "check" }, gate, "measure first, with the gate of this label");
  const fit = () => {
    const g = told.gates[label.value];
    ask_it.hidden = about.hidden = !g;
    gate.checked = Boolean(g);
    about.textContent = g ? `${g.command}${g.min_gain === null ? "" : `; gain of at least ${g.min_gain}`}${g.min_value === null ? "" : `; value of at least ${g.min_value}`}. It runs for this version and the one that the label is on, which takes as long as it takes.` : "";
  };
  label.addEventListener("input", fit);
  fit();
  const parts = [field("promote-label", "Label", label, "Requests for the label get this version from their next answer on."), known, ask_it, about];
  confirmed(`Promote ${told.name}@${version.version}?`, parts, "Promote").then((yes) => yes && change(
    () => post(`adapters/${told.name}/promote`, { version: version.version, label: label.value, gate: gate.checked }),
    (m) => `${m.name}@${m.label} is version ${m.version} (${m.changed ? `was ${m.before ?? "none"}` : "already"})${m.gate ? `; gate passed: ${value(m.gate.value)}` : ""}.`));
}

// Parents on the left, versions of the name in the middle, what was made from them on the right.
function ancestry(root, told) {
  const own = told.versions.filter((v) => v.full).slice(0, 12);
  const nodes = new Map();
  const edges = [];
  const rows = [0, 0, 0];
  const node = (key, column, mark = "") => {
    if (!nodes.has(key)) nodes.set(key, { key, x: column, y: rows[column]++, mark });
    return key;
  };
  for (const v of own) node(`${told.name}@${v.version}`, 1, v.labels.join(", "));
  for (const v of own) {
    const me = `${told.name}@${v.version}`;
    for (const p of v.parents) edges.push([node(p.names[0] ?? p.id.slice(0, 12), p.names[0]?.startsWith(`${told.name}@`) ? 1 : 0), me, p.how]);
    for (const c of v.children.slice(0, 8)) if (!c.name.startsWith(`${told.name}@`)) edges.push([me, node(c.name, 2), c.how]);
  }
  const said = edges.map(([a, b, how]) => `${b} was ${how} ${a}`);
  if (!edges.length) {
    root.append(make("p", { class: "soft" }, "No version was made from another adapter, and none was made from them. deltaw readapt, combine and compress keep parents."));
    return () => {};
  }
  const at = (key) => nodes.get(key);
  const high = Math.max(...rows);
  const used = [0, 1, 2].filter((i) => rows[i]);
  const place = (n) => used.indexOf(n.x);
  const of = (along, dashed) => edges.filter(([a, b, how]) => (at(a).x === at(b).x) === along && (how !== "made from") === dashed);
  const arrow = (along, dashed) => Plot.arrow(of(along, dashed), { x1: ([a]) => place(at(a)), y1: ([a]) => at(a).y, x2: ([, b]) => place(at(b)), y2: ([, b]) => at(b).y,
    bend: along, inset: 9, headLength: 7, stroke: css("grey"), strokeWidth: 2, strokeDasharray: dashed ? "5,3" : null });
  const shown = drawn(root, "Where versions come from.", "An arrow leads from a parent to what was made from it, dashed where that was for another base; orange is current.", said.join("; "), (width) => ({
    height: 50 + 48 * high, marginLeft: 26, marginRight: 12, marginBottom: 12, marginTop: 30,
    x: { type: "linear", domain: [0, used.length - 0.3], axis: null }, y: { type: "linear", domain: [high - 0.4, -0.6], axis: null },
    marks: [
      Plot.text(used, { x: (i) => used.indexOf(i), y: -0.6, text: (i) => ["made from", brief(told.name), "led to"][i], textAnchor: "start", fill: css("soft"), fontSize: 13 }),
      ...[[true, true], [true, false], [false, true], [false, false]].map(([along, dashed]) => arrow(along, dashed)),
      Plot.dot([...nodes.values()], { x: place, y: "y", r: 6, fill: (n) => (n.mark.includes("current") ? css("orange") : css("blue")), stroke: css("page") }),
      Plot.text([...nodes.values()], { x: place, y: "y", dy: 16, text: (n) => brief(`${n.key}${n.mark ? ` ${n.mark}` : ""}`, width < 500 ? 15 : 34), textAnchor: "start", fontSize: 13, stroke: css("page"), fill: css("text") }),
    ],
  }));
  root.append(make("ul", { class: "plain" }, ...said.map((s) => make("li", {}, s))));
  return shown;
}

function compare(told) {
  const [newest, older] = told.versions;
  if (!older) return make("p", { class: "soft" }, "There is one version: nothing to compare.");
  const pick = (id, label, chosen) => {
    const select = make("select", {});
    for (const v of told.versions) select.add(new Option(`${v.version}${v.labels.length ? ` (${v.labels.join(", ")})` : ""}`, String(v.version), false, v === chosen));
    return field(id, label, select);
  };
  const place = make("div", { "aria-live": "polite" });
  const form = make("form", { class: "line" }, pick("diff-a", "version", told.versions.find((v) => v.labels.includes("current")) ?? older), pick("diff-b", "against", newest),
    make("button", { type: "submit" }, "Compare"));
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const [a, b] = [...form.querySelectorAll("select")].map((s) => s.value);
    try {
      place.replaceChildren(...differences(await ask(`adapters/${told.name}/diff?a=${a}&b=${b}`)));
    } catch (problem) { place.replaceChildren(make("p", { class: "problem" }, problem.message)); }
  });
  return make("div", {}, form, place);
}

function differences(d) {
  if (d.same) return [make("p", {}, `${d.a.version} and ${d.b.version} hold the same adapter, bit for bit.`)];
  const rows = ["settings", "base", "recipe"].flatMap((what) => Object.entries(d[what]).map(([key, [a, b]]) => ({ what, key, a, b })));
  if (d.data_hash) rows.push({ what: "data", key: "rows (SHA-256)", a: d.data_hash[0]?.slice(0, 12), b: d.data_hash[1]?.slice(0, 12) });
  const keys = new Set(d.metrics.flatMap((m) => Object.keys(m ?? {})));
  for (const key of keys) if (d.metrics[0]?.[key] !== d.metrics[1]?.[key]) rows.push({ what: "metrics", key, a: d.metrics[0]?.[key], b: d.metrics[1]?.[key] });
  const text = (v) => (v === null || v === undefined ? "none" : typeof v === "object" ? JSON.stringify(v) : value(v));
  const t = d.tensors;
  const gap = t.largest_change === null ? "shapes differ" : `the largest change of one number is ${value(t.largest_change)}`;
  return [
    make("p", {}, `${d.related ? `${d.related}. ` : ""}Tensors: ${t.changed} differ, ${t.same} are the same bit for bit, ${t.only_a} only in ${d.a.version}, ${t.only_b} only in ${d.b.version}; ${gap}.`),
    rows.length ? table(`What differs between ${d.a.version} and ${d.b.version}`, [["of", (r) => r.what], ["key", (r) => r.key.replaceAll("_", " ")], [d.a.version, (r) => text(r.a)], [d.b.version, (r) => text(r.b)]], rows)
      : make("p", {}, "Settings, base, recipe, data and metrics are the same."),
  ];
}

function trail(told) {
  const line = (e) => {
    if (e.kind === "gate") {
      return `gate for ${e.label}: version ${e.version} ${e.passed ? "passed" : "did not pass"} with ${value(e.value)}${e.against === null ? "" : `, version ${e.against} had ${value(e.against_value)}`} (${e.command})`;
    }
    const to = e.version === null ? "off every version" : `to version ${e.version}`;
    return `${e.action}: ${e.label} ${to}${e.before === null ? "" : `, from version ${e.before}`}`;
  };
  return make("ol", { class: "trail" }, ...told.trail.map((e) => make("li", {}, day(e.at), ` ${line(e)}`)));
}

export const page = {
  address: "adapters",
  title: "Adapters",
  notice: "What the registry keeps: each name has versions, and labels say which of them is in use.",
  show: (root, rest, query) => (query.has("add") ? add(root, query.get("add")) : rest ? one(root, rest) : names(root, query)),
};
