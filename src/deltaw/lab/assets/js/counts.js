// Pictures 2, 5, 8, 11, and 4: counts, bytes, levels.

import { chart, css, KINDS, legend, make, marked, rimmed, room, short, table } from "./charts.js";

const { Plot } = globalThis;

export function draw2(data) {
  const rows = data.rows.map((r) => r.role);
  const most = Math.max(...data.rows.map((r) => r.full)) * 2;
  return [
    legend([["base, frozen", css("grey")], ["LoRA", css("orange")]]),
    chart(`Numbers in ${data.model} and in its adapter by kind of linear map, on a scale of powers of ten`, {
      height: 80 + 34 * rows.length, marginLeft: 80, marginRight: 60,
      x: { type: "log", domain: [1e3, most], label: "numbers in all layers (powers of ten)", tickFormat: short, ticks: [1e3, 1e6, 1e9].filter((t) => t < most), clamp: true },
      y: { type: "band", domain: rows, label: null, padding: 0.15 },
      marks: [
        ...[["full", "grey", -7], ["adapter", "orange", 7]].flatMap(([key, colour, dy]) => [
          Plot.link(data.rows.filter((r) => r[key] > 0), { x1: 1e3, x2: key, y1: "role", y2: "role", stroke: css(colour), strokeWidth: 11, dy }),
          Plot.text(data.rows.filter((r) => r[key] > 0), { x: key, y: "role", text: (d) => short(d[key]), dx: 5, dy, textAnchor: "start" }),
        ]),
      ],
    }),
    make("p", { class: "flow" }, "the rest: embeddings, head and norms, which this adapter leaves alone"),
  ];
}

export function draw4(data) {
  const columns = room() > 560 ? 2.06 : 1;
  return [
    make("p", { class: "flow" }, "weights over the largest of their block (grey), and the levels of the format (orange)"),
    chart(`Histogram of the weights with the ${data.levels.length} levels of ${data.format}`, {
      height: 240, x: { label: "weight / largest of its block", domain: [-1, 1] }, y: { label: "share of the weights", tickFormat: "%", grid: true, nice: true },
      marks: [
        Plot.rectY(data.histogram, { x1: (d) => d.at - 1 / data.histogram.length, x2: (d) => d.at + 1 / data.histogram.length, y: "share", fill: css("grey"), fillOpacity: 0.6 }),
        data.levels.length && data.levels.length <= 16
          ? Plot.ruleX(data.levels, { stroke: css("orange"), strokeWidth: 2 })
          : Plot.text([data.levels.length ? `${data.levels.length} levels: too close to draw` : "floating point: no levels of a block"], { frameAnchor: "top", dy: 10 }),
        Plot.ruleY([0]),
      ],
    }),
    data.levels.length && data.levels.length <= 16
      ? make("p", { class: "flow", id: "levels" }, `levels: ${data.levels.map((v) => v.toFixed(4)).join(", ")}`) : "",
    make("div", { class: "answers" },
      make("figure", {}, make("figcaption", {}, "error of all formats, same weights"), chart("Error of each format", {
        columns, height: 210, marginLeft: 50, marginRight: 135, x: { label: "relative error", tickFormat: "%", ticks: 3 }, y: { label: null, domain: data.formats.map((f) => f.format) },
        marks: [
          Plot.barX(data.formats, { x: "error", y: "format", fill: (d) => (d.format === data.format ? css("orange") : css("grey")) }),
          Plot.text(data.formats, { x: "error", y: "format", dx: 4, textAnchor: "start", text: (d) => `${(100 * d.error).toFixed(2)} %, ${d.bits.toFixed(2)} bits` }),
        ],
      })),
      make("figure", {}, make("figcaption", {}, `error in each of ${data.columns.length} columns, ${data.format}`), chart("Error of each column", {
        columns, height: 210, marginLeft: 50, x: { label: "column", ticks: 4 }, y: { label: "relative error", tickFormat: "%", zero: true, grid: true, ticks: 4 },
        marks: [Plot.dot(data.columns, { x: (_, i) => i, y: (d) => d, r: 1.5, fill: css("blue") })],
      }))),
  ];
}

const bytes = (n) => (n >= 1e12 ? `${(n / 1e12).toFixed(2)} TB` : n >= 1e9 ? `${(n / 1e9).toFixed(1)} GB` : `${(n / 1e6).toFixed(0)} MB`);

export function draw5(data) {
  const line = (key, stroke, dash) => Plot.lineY(data.storage, { x: "tasks", y: key, stroke, strokeDasharray: dash, strokeWidth: 2.5 });
  return [
    make("p", { class: "flow" }, "memory to train one task, before activations"),
    chart("Memory of full fine-tuning and of LoRA", {
      height: 150, marginLeft: 60, marginRight: 90, x: { label: "GB", transform: (d) => d / 1e9, grid: true, ticks: 5 }, y: { label: null, domain: ["full", "LoRA"] },
      marks: [
        Plot.barX(data.memory, { x: "bytes", y: "name", fill: (d) => (d.name === "full" ? css("grey") : css("orange")) }),
        Plot.text(data.memory, { x: "bytes", y: "name", text: (d) => bytes(d.bytes), dx: 4, textAnchor: "start" }),
      ],
    }),
    make("p", { class: "flow" }, "disk for many tasks"),
    legend([["a copy of the model for each task", css("grey"), "0"], ["one base, an adapter for each task", css("orange"), "6 4"]]),
    chart("Disk space against the number of tasks", {
      height: 250, marginLeft: 60, x: { label: "tasks" }, y: { label: "GB", transform: (d) => d / 1e9, grid: true },
      marks: [line("copies", css("grey"), "0"), line("adapters", css("orange"), "6 4"),
        ...marked(data.tasks, `${data.tasks} ${data.tasks === 1 ? "task" : "tasks"}`, data.tasks / data.storage.at(-1).tasks)],
    }),
  ];
}

export function draw8(data) {
  const side = 260;
  const thin = Math.min(38, Math.max(2, (data.rank / data.d) * side));
  const square = globalThis.d3.create("svg").attr("viewBox", `0 0 ${side + 70} ${side + 24 + thin}`).attr("width", side + 70).attr("role", "img")
    .attr("aria-label", `W as a square and the adapter's two thin factors to scale: ${(100 * data.share).toFixed(2)} percent`);
  square.append("rect").attr("y", 10).attr("width", side).attr("height", side).attr("fill", css("grey")).attr("fill-opacity", 0.35);
  square.append("text").attr("x", side / 2).attr("y", side / 2).attr("text-anchor", "middle").text(`W: ${data.d} x ${data.d}`);
  square.append("rect").attr("x", side + 12).attr("y", 10).attr("width", thin).attr("height", side).attr("fill", css("orange"));
  square.append("rect").attr("y", side + 20).attr("width", side).attr("height", thin).attr("fill", css("orange"));
  return [
    square.node(),
    make("p", {}, `Right of W: B, ${data.d} x ${data.rank}. Below W: A, ${data.rank} x ${data.d}. ` + (thin < 38 ? "Drawn to scale, but never thinner than a line." : "Wider than can be drawn.")),
    chart("Share of the matrix that trains, against the rank", {
      height: 260, marginLeft: 60, x: { type: "log", base: 2, label: "rank", tickFormat: "d" }, y: { type: "log", label: "share", tickFormat: (v) => `${+(100 * v).toPrecision(2)} %`, ticks: 5, grid: true },
      marks: [
        Plot.lineY(data.curve, { x: "rank", y: "share", stroke: css("blue"), strokeWidth: 2.5 }),
        Plot.dot([data], { x: "rank", y: "share", r: 7, fill: css("orange") }),
        Plot.text([data], { x: "rank", y: "share", text: (d) => `r = ${d.rank}: ${(100 * d.share).toFixed(2)} %`, dx: data.rank > 64 ? -12 : 12, dy: data.rank > 64 ? -12 : 16, textAnchor: data.rank > 64 ? "end" : "start", ...rimmed() }),
      ],
    }),
  ];
}

export function draw11(data) {
  const shown = data.causes.filter((cause) => data.bars.some((b) => b.bytes[cause] > 0));
  const colour = Object.fromEntries(data.causes.map((cause, i) => [cause, KINDS[i]]));
  const parts = data.bars.flatMap((b) => shown.map((cause) => ({ method: b.method, cause, gb: (b.bytes[cause] ?? 0) / 1e9 })));
  const most = Math.max(0, ...data.bars.map((b) => b.peak / 1e9));
  const cards = data.cards.filter((c) => c < most * 3);
  const made = new Map(data.bars.map((b) => [b.method, b]));
  const gb = (method, cause) => (made.has(method) ? ((made.get(method).bytes[cause] ?? 0) / 1e9).toFixed(3) : "...");
  return [
    legend(shown.map((cause) => [cause, colour[cause]])),
    chart(`Memory at the peak of training ${data.model} by cause, with single GPUs of ${data.cards.join(", ")} GB as lines`, {
      height: 280, marginLeft: 70, marginRight: 80, marginTop: 30, x: { label: "GB at the peak", grid: true, domain: [0, Math.max(most, ...cards) * 1.02 || 1] },
      y: { label: null, domain: data.methods },
      marks: [
        Plot.barX(parts, Plot.stackX({ x: "gb", y: "method", fill: (d) => colour[d.cause], order: shown, z: "cause" })),
        Plot.ruleX(cards, { stroke: css("text"), strokeDasharray: "4 3", strokeWidth: 1.5 }),
        Plot.text(data.bars, { x: (d) => d.peak / 1e9, y: "method", text: (d) => bytes(d.peak), dx: 5, textAnchor: "start", ...rimmed() }),
        Plot.text(data.pending, { frameAnchor: "left", y: (d) => d, text: () => "being computed", dx: 6, ...rimmed() }),
        Plot.text(cards, { x: (d) => d, frameAnchor: "top", text: (d) => (room() > 500 ? `${d} GB` : d), dy: -16 }),
      ],
    }),
    table("the same in GB", [["cause", (cause) => cause], ...data.methods.map((m) => [m, (cause) => gb(m, cause), "number"])], shown),
    make("p", { class: "flow" }, `Dashed: single GPUs of ${data.cards.join(", ")} GB. ${data.bars.map((b) => `${b.method} in ${b.dtype}. `).join("")}Each bar is its fullest moment; without activations, that is when they are freed again.`),
    make("p", { role: "status" }, data.pending.length ? `still being computed: ${data.pending.join(", ")}` : ""),
  ];
}
