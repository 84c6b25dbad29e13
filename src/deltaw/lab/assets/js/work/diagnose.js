// A diagnosis as pictures: findings first, then what they stand on.

import { css, legend, ramp } from "../charts.js";
import { ask, button, field, link, make, post, table, teller } from "./ui.js";
import { Plot, SHAPES, again, count, d3, drawn, value } from "./show.js";

const ORDER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
const kinds = (rows) => [...new Set(rows.map((r) => r.role))].sort((a, b) => (ORDER.indexOf(a) + 1 || 99) - (ORDER.indexOf(b) + 1 || 99));
const given = (p) => p.spectrum.values.length;
const colours = () => ["#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", css("grey"), "#a6761d"];

async function choose(root) {
  const told = await ask("diagnose/subjects");
  if (!told.runs.length && !told.adapters.length) {
    root.append(make("p", { class: "empty" }, "There is nothing to look at yet: no run, and no adapter in the registry. ", link("#train", "Train one"), "."));
    return;
  }
  const group = (title, what, names) => [make("h2", {}, title), names.length
    ? make("ul", { class: "choices" }, ...names.map((n) => make("li", {}, link(`#diagnose?${what}=${encodeURIComponent(n)}`, n)))) : make("p", { class: "soft" }, "none")];
  root.append(make("p", {}, "Choose what to look at. A run tells more than an adapter alone: it has the loss curve."), ...group("Runs", "run", told.runs),
    ...group("Adapters of the registry", "adapter", told.adapters), told.more ? make("p", { class: "soft" }, "... and more: each has a link on its page of ", link("#adapters", "Adapters"), ".") : "");
}

async function look(root, what, name) {
  const subject = { [what]: name };
  const say = teller();
  const body = make("div", {});
  const side = make("section", { class: "panel", "aria-label": "Checks that take longer" });
  root.append(make("p", {}, link("#diagnose", "Choose another"), " or see ", what === "run" ? link(`#runs/${encodeURIComponent(name)}`, "the run") : link(`#adapters/${name.split("@")[0]}`, "the adapter")),
    make("h2", { class: "big" }, name), say.node, side, body);
  let leave = () => {};
  let timer = 0;
  let seen = "";
  async function show() {
    const told = await ask(`diagnose?${new URLSearchParams(subject)}`);
    const slow = told.slow;
    const states = JSON.stringify([Object.entries(slow).map(([k, c]) => [k, c.state])]);
    checks(side, told, slow, act);
    if (states !== seen) {  // pictures change only when a check begins or ends
      seen = states;
      leave();
      body.replaceChildren();
      leave = pictures(body, merged(told, slow));
    }
    if (Object.values(slow).some((c) => c.state === "running")) timer = setTimeout(() => show().catch(say.problem), 700);
  }
  async function act(path, given) {
    try {
      clearTimeout(timer);
      await post(`diagnose/${path}`, { ...subject, ...given });
      await show();
    } catch (problem) { say.problem(problem); }
  }
  await show();
  return () => { clearTimeout(timer); leave(); };
}

// What the slow checks found takes the place of what was known before them.
function merged(told, slow) {
  const done = ["base", "forgetting", "rank"].map((k) => slow[k]?.result).filter(Boolean);
  if (!done.length) return told;
  const all = { ...told, ...done[0] };
  for (const one of done.slice(1)) for (const key of ["forgetting", "trial", "data"]) all[key] = all[key] ?? one[key];
  const kept = new Map(done.flatMap((d) => d.findings).map((f) => [f.kind, f]));
  if (slow.rank?.result && !slow.rank.result.findings.some((f) => f.kind === "rank_too_low")) kept.delete("rank_too_low");
  all.findings = [...kept.values()];
  all.not_made = done[0].not_made.filter((n) => !(n.check === "forgetting" && all.forgetting));
  return { ...all, steps: told.steps, n_steps: told.n_steps, captions: told.captions, flat: told.flat, name: told.name };
}

const WORDS = {
  base: ["Measure against the base", "Norms of the weights, the base's identity, what merging would leave: some seconds."],
  forgetting: ["Measure forgetting", "General questions and text, without and with the adapter: minutes."],
  rank: ["Try another rank", "The run's steps again with this rank: as long as the run took."],
};

function checks(side, told, slow, act) {
  const focused = side.contains(document.activeElement) ? document.activeElement.id : "";
  const kept = side.querySelector("#try-rank")?.value;
  const own = side.querySelector("#own-base")?.checked;
  const onLab = make("input", { type: "checkbox", id: "own-base" });
  onLab.checked = Boolean(own);
  const rank = make("input", { type: "number", min: "1", max: "4096", value: kept ?? String(4 * (told.places.find((p) => p.rank)?.rank ?? 8)) });
  const row = (key) => {
    const [label, about] = WORDS[key];
    const check = slow[key];
    const running = check?.state === "running";
    const given = () => ({ check: key, rank: Number(rank.value), on_lab_base: onLab.checked });
    const go = button(running ? `Stop: ${label.toLowerCase()}` : label, () => act(running ? "stop" : "start", given()), { id: `check-${key}` });
    if (check?.state === "done" && key !== "rank") go.disabled = true;
    const state = !check ? about : running ? `At work: ${check.said.at(-1) ?? "beginning"} ...` : check.state === "failed" ? `It could not be done: ${check.error}` : check.state === "stopped" ? "Stopped." : "Done: what it found is below.";
    return make("div", { class: "check-row" }, go, key === "rank" ? field("try-rank", "rank", rank) : "", make("span", { role: "status", class: check?.state === "failed" ? "problem" : "soft" }, state));
  };
  const every = told.steps.length ? ["base", "rank", "forgetting"] : ["base", "forgetting"];
  side.replaceChildren(make("h2", {}, "Checks that take longer"), ...every.map(row), make("label", { class: "check" }, onLab, "on this lab's base, instead of the base that it names"));
  if (focused) document.getElementById(focused)?.focus();
}

// Findings and pictures -----------------------------------------------------------------------------

function pictures(root, told) {
  const draws = [];
  root.append(make("h2", {}, told.findings.length ? `${told.findings.length === 1 ? "One finding" : `${told.findings.length} findings`}` : "No finding"));
  if (!told.findings.length) root.append(make("p", { class: "well" }, `None of the known failures was found${told.base ? "" : " in what was looked at so far; the base was not"}.`));
  for (const f of told.findings) {
    root.append(make("section", { class: "finding" }, make("h3", {}, f.title, make("span", { class: "tag no" }, f.kind)), make("p", {}, `${f.message[0].toUpperCase()}${f.message.slice(1)}`),
      make("p", {}, make("strong", {}, "What to do: "), f.remedy), f.where.length ? make("p", { class: "soft" }, `Places: ${f.where.slice(0, 5).join(", ")}${f.where.length > 5 ? " ..." : ""}`) : ""));
  }
  root.append(make("p", { class: "soft" }, about(told)));
  const places = told.places;
  if (told.steps.length > 1) draws.push(loss(root, told));
  if (told.bands.length) bands(root, told, draws);
  if (places.some((p) => p.ratio)) norms(root, told, draws);
  if (places.some((p) => p.spectrum && p.spectrum.norm > 0 && given(p) > 1)) spectra(root, told, draws);
  else if (places.some((p) => p.rank === 1)) root.append(make("p", { class: "soft" }, "Rank 1 leaves each place one direction: there is no spectrum to draw."));
  measured(root, told);
  if (told.not_made.length) root.append(make("h2", {}, "Not checked"), make("ul", {}, ...told.not_made.map((n) => make("li", {}, make("strong", {}, n.check), `: ${n.why}`))));
  return again(draws);
}

function about(told) {
  const known = [`method ${told.method}`];
  if (told.adapter) known.push(`adapter ${told.adapter.slice(0, 12)}`);
  if (told.places.length) known.push(`${told.places.length} places`);
  if (told.scale !== null) known.push(`scale ${value(told.scale)}`);
  if (told.learning_rate !== null) known.push(`learning rate ${value(told.learning_rate)}`);
  if (told.steps.length) known.push(`${told.steps.at(-1)[0]}${told.n_steps ? ` of ${told.n_steps}` : ""} steps`);
  return `${known.join(", ")}.`;
}

function loss(root, told) {
  const c = told.curve;
  const steps = told.steps.map(([step, l]) => ({ step, loss: l })).filter((s) => s.loss !== null);
  const parts = c ? c.means.map((mean, i) => ({ loss: mean, step: d3.mean(steps.slice(Math.round((i * steps.length) / c.means.length), Math.round(((i + 1) * steps.length) / c.means.length)), (s) => s.step) })) : [];
  const evals = told.evaluations.filter((e) => e.loss !== null);
  const at = c?.plateau_step ?? null;
  const wide = d3.max(steps, (s) => s.loss) > 20 * d3.median(steps, (s) => s.loss) && d3.min(steps, (s) => s.loss) > 0;
  const draw = drawn(root, "Loss over the run.", told.captions.loss, `Loss from ${value(c?.start ?? steps[0].loss)} to ${value(c?.final ?? steps.at(-1).loss)}; ${at === null ? "no plateau" : `a plateau from step ${at}`}`, () => ({
    height: 280, x: { label: "optimizer step" }, y: wide ? { type: "log", label: "loss", grid: true, ticks: 5, tickFormat: (v) => value(v) } : { label: "loss", grid: true, zero: true },
    marks: [
      ...(at === null ? [] : [Plot.rect([0], { x1: at, x2: steps.at(-1).step, fill: css("mark"), fillOpacity: 0.6 }), Plot.text([at], { x: (d) => d, frameAnchor: "top", text: () => `plateau from step ${at}`, textAnchor: "start", dx: 4 })]),
      Plot.dot(steps, { x: "step", y: "loss", r: 2, fill: css("grey") }),
      Plot.lineY(parts, { x: "step", y: "loss", stroke: css("blue"), strokeWidth: 3 }),
      Plot.lineY(evals, { x: "step", y: "loss", stroke: css("orange"), strokeWidth: 2, strokeDasharray: "5,3" }),
      Plot.dot(evals, { x: "step", y: "loss", fill: css("orange"), symbol: "diamond", r: 5 }),
    ],
  }));
  root.append(legend([["each step", css("grey")], ...(parts.length ? [["mean of an eighth of the steps", css("blue"), "0"]] : []), ...(evals.length ? [["validation rows", css("orange"), "5,3"]] : [])]));
  return draw;
}

// Each value on a scale of powers of ten; the usual range is a band, the value a mark that is in it or not.
function bands(root, told, draws) {
  root.append(make("h2", {}, "Are the steps of a usual size?"));
  for (const b of told.bands) {
    const inside = (b.low === null || b.value >= b.low) && (b.high === null || b.value <= b.high);
    const percent = b.what.includes("turn") || b.what.includes("norm");
    const write = (v) => (percent ? `${Number((100 * v).toPrecision(3))} %` : value(v));
    const usual = b.low === null ? `under ${write(b.high)}` : b.high === null ? `over ${write(b.low)}` : `${write(b.low)} to ${write(b.high)}`;
    const known = [b.value, b.low, b.high, b.wild].filter((v) => v !== null && v > 0);
    const [from, to] = [d3.min(known) / 8, d3.max(known) * 8];
    draws.push(drawn(root, `${b.what[0].toUpperCase()}${b.what.slice(1)}: ${write(b.value)},`, `${inside ? "usual" : "not usual"}: the band is ${usual}${b.wild === null ? "" : `, and from ${write(b.wild)} on (dashed) it is far off`}.`,
      `${b.what} is ${write(b.value)}; usual is ${usual}`, () => ({
        height: 64, marginLeft: 16, marginRight: 16, marginTop: 4, marginBottom: 28, x: { type: "log", domain: [from, to], label: null, ticks: 4, tickFormat: (v) => write(v) }, y: { axis: null, domain: [0, 1] },
        marks: [Plot.rect([0], { x1: b.low ?? from, x2: b.high ?? to, y1: 0.25, y2: 0.75, fill: css("blue"), fillOpacity: 0.3 }), Plot.ruleX([from], { strokeOpacity: 0 }),
          ...(b.wild === null ? [] : [Plot.ruleX([b.wild], { stroke: css("grey"), strokeDasharray: "4,3" })]),
          Plot.ruleX([b.value], { stroke: css("text"), strokeWidth: 2 }), Plot.dot([b.value], { x: (d) => d, y: 0.5, r: 7, symbol: inside ? "circle" : "diamond", fill: inside ? css("blue") : css("orange"), stroke: css("page") })],
      })));
  }
}

function norms(root, told, draws) {
  const rows = told.places.filter((p) => p.ratio && p.layer !== null);
  const roles = kinds(rows);
  root.append(make("h2", {}, "Update against weight"));
  draws.push(drawn(root, "Update norm over weight norm, by layer and kind of map.", told.captions.norms, `Update norm over weight norm at ${rows.length} places, from ${value(d3.min(rows, (r) => r.ratio))} to ${value(d3.max(rows, (r) => r.ratio))}`, () => ({
    height: 300, marginLeft: 56, x: { label: "layer", type: "linear", tickFormat: "d" }, y: { type: "log", label: "|dW| / |W|", grid: true, ticks: 5, tickFormat: (v) => String(Number(v.toPrecision(1))) },
    color: { domain: roles, range: colours() }, symbol: { domain: roles, range: SHAPES },
    marks: [Plot.rect([0], { y1: 0.001, y2: 0.1, fill: css("blue"), fillOpacity: 0.12 }), Plot.dot(rows, { x: "layer", y: "ratio", fill: "role", symbol: "role", r: 4.5 })],
  })), kindsOf(root, roles));
  root.append(make("p", { class: "soft" }, "The pale band is 0.001 to 0.1, where most were in runs that went well."));
}

// A legend with the shape that each kind has in the chart above.
function kindsOf(root, roles) {
  const place = make("div", {});
  root.append(place);
  const draw = () => {
    const made = Plot.legend({ symbol: { domain: roles, range: SHAPES }, color: { domain: roles, range: colours() }, fill: "color" });
    for (const style of made.querySelectorAll("style")) style.remove();
    made.removeAttribute("style");
    place.replaceChildren(make("div", { class: "kinds" }, made));
  };
  draw();
  return draw;
}

function spectra(root, told, draws) {
  const rows = told.places.filter((p) => p.spectrum && p.spectrum.norm > 0);
  const roles = kinds(rows);
  const layered = rows.filter((p) => p.layer !== null);
  const used = (p) => p.spectrum.rank_99 / given(p);
  root.append(make("h2", {}, "Which directions the update uses"));
  if (layered.length) {
    const mean = (share) => d3.median(rows, (p) => p.spectrum[share]);
    draws.push(drawn(root, "Rank used, by layer and kind of map.", `${told.captions.ranks} Median: ${mean("rank_99")} of ${d3.median(rows, (p) => given(p))} hold 99 % of the energy, ${mean("rank_90")} hold 90 %.`,
      `Rank in use at ${layered.length} places`, (width) => ({
        height: 50 + 30 * roles.length, marginLeft: 92, x: { type: "band", label: "layer", domain: d3.range(d3.max(layered, (p) => p.layer) + 1), tickFormat: (v) => (width > 600 || v % 5 === 0 ? v : "") }, y: { type: "band", label: null, domain: roles },
        color: { type: "linear", domain: [0, 1], interpolate: d3.interpolateViridis },
        marks: [Plot.cell(layered, { x: "layer", y: "role", fill: used, inset: 0.5, title: (p) => `${p.name}: ${p.spectrum.rank_99} of ${given(p)}` }),
          ...(width > 600 ? [Plot.text(layered, { x: "layer", y: "role", text: (p) => p.spectrum.rank_99, fill: (p) => (used(p) > 0.6 ? "#000" : "#fff"), fontSize: 11 })] : [])],
      })));
    const bar = make("div", {});
    const fill = () => bar.replaceChildren(ramp("rank in use over the rank given", "1", d3.interpolateViridis));
    fill();
    root.append(bar);
    draws.push(fill);
  }
  const select = make("select", {});
  select.add(new Option("every kind (medians)", ""));
  for (const role of roles) select.add(new Option(`${role}, layer by layer`, role));
  root.append(make("div", { class: "line" }, field("spectra-kind", "Singular values of", select)));
  const draw = drawn(root, "Singular values of the update, each over the largest of its place.", told.captions.spectra, "Singular values of the update, over the largest", () => lines(rows, roles, select.value, told.flat));
  const mark = kindsOf(root, roles);
  const legends = root.lastChild;
  const layers = make("p", { class: "flow" }, "dark lines are the first layers, bright ones the last");
  root.append(layers);
  const fit = () => { legends.hidden = select.value !== ""; layers.hidden = select.value === ""; };
  fit();
  select.addEventListener("change", () => { fit(); draw(); });
  draws.push(draw, mark);
}

function lines(rows, roles, role, flat) {
  const points = [];
  if (role) {
    for (const p of rows.filter((r) => r.role === role)) p.spectrum.values.slice(0, 256).forEach((v, i) => v > 0 && points.push({ at: i + 1, share: v / p.spectrum.values[0], line: p.name, layer: p.layer ?? 0 }));
  } else {
    for (const kind of roles) {
      const own = rows.filter((r) => r.role === kind).map((r) => r.spectrum.values);
      for (let i = 0; i < Math.min(256, d3.max(own, (v) => v.length)); i += 1) {
        const there = own.filter((v) => v[i] > 0);
        if (there.length) points.push({ at: i + 1, share: d3.median(there, (v) => v[i] / v[0]), line: kind, role: kind });
      }
    }
  }
  const colour = role ? { type: "linear", interpolate: d3.interpolateViridis, domain: [0, Math.max(1, d3.max(points, (p) => p.layer))] } : { domain: roles, range: colours() };
  return {
    height: 300, marginLeft: 56, x: { type: "linear", label: "singular value, the largest first", ticks: Math.min(12, d3.max(points, (p) => p.at)), tickFormat: "d" },
    y: { type: "log", label: "share of the largest", grid: true, ticks: 4, tickFormat: (v) => String(Number(v.toPrecision(1))) }, color: colour, symbol: { domain: roles, range: SHAPES },
    marks: [Plot.ruleY([flat], { stroke: css("grey"), strokeDasharray: "4,3" }), Plot.text([flat], { y: (d) => d, frameAnchor: "right", text: () => `flat, if it ends above ${flat}`, dy: -8, fill: css("soft") }),
      Plot.lineY(points, { x: "at", y: "share", z: "line", stroke: role ? "layer" : "role", strokeWidth: role ? 1.5 : 2 }), ...(role ? [] : [Plot.dot(points, { x: "at", y: "share", fill: "role", symbol: "role", r: 4 })])],
  };
}

function measured(root, told) {
  const rows = [];
  const c = told.curve;
  if (c) rows.push(["loss: first, best eighth, last quarter", [c.start, c.best, c.final].map(value).join(", ")], ["plateau from step", c.plateau_step === null ? "none" : String(c.plateau_step)]);
  for (const [name, m] of Object.entries(told.merge)) rows.push([`merged in ${name}: rounding's energy over the update's`, value(m.error)], [`merged in ${name}: changed weights that are the base's again`, `${(100 * m.lost).toFixed(1)} %`]);
  const f = told.forgetting;
  if (f?.n) rows.push([`general questions right, of ${f.n}: before, after`, `${f.right_before}, ${f.right_after}`]);
  if (f?.perplexity_before) rows.push(["perplexity on general text: before, after", `${value(f.perplexity_before)}, ${value(f.perplexity_after)}`]);
  const t = told.trial;
  if (t) rows.push([`loss of the last steps: rank ${t.rank}, rank ${t.other}`, `${value(t.loss)}, ${value(t.reached)} (gain ${value(t.gain)}, uncertainty ${value(t.noise)})`]);
  if (rows.length) root.append(make("h2", {}, "Measured"), table("Values behind the findings", [["what", (r) => r[0]], ["value", (r) => r[1]]], rows));
  if (told.places.length) {
    const all = make("details", {}, make("summary", {}, `All ${told.places.length} places as a table`));
    all.addEventListener("toggle", () => all.open && all.children.length < 2 && all.append(table("One row a linear map that the adapter changes", [
      ["place", (p) => p.name], ["rank", (p) => value(p.rank), "number"], ["for 90 %", (p) => value(p.spectrum?.rank_90), "number"], ["for 99 %", (p) => value(p.spectrum?.rank_99), "number"],
      ["last / first", (p) => (p.spectrum ? p.spectrum.last.toFixed(3) : ""), "number"], ["|dW|", (p) => value(p.update_norm), "number"], ["|dW| / |W|", (p) => value(p.ratio), "number"], ["shape", (p) => p.shape.map(count).join(" x ")]], told.places)));
    root.append(all);
  }
}

export const page = {
  address: "diagnose",
  title: "Diagnose",
  notice: "What went wrong with a run or an adapter, what it stands on, and what to do.",
  show: (root, rest, query) => (query.get("run") ? look(root, "run", query.get("run")) : query.get("adapter") ? look(root, "adapter", query.get("adapter")) : choose(root)),
};
