// Pictures 1, 6, 7, 13: low rank.

import { chart, css, heatMaps, legend, make, marked, room, scaleNote, strip } from "./charts.js";

const { Plot } = globalThis;

export function draw1(data) {
  const [out, r] = data.B;
  return [
    heatMaps(data.grids),
    make("p", { class: "flow" }, `B [${out}, ${r}] times A [${r}, ${data.A[1]}]; the change is made (its directions fall by a fifth each), W0 is real.`),
    scaleNote(data.grids),
  ];
}

export function draw6(data) {
  const looks = [[css("blue"), "0"], [css("grey"), "6 4"], [css("orange"), "2 3"]];
  const points = data.curves.flatMap((c) => c.rank.map((rank, i) => ({ name: c.name, rank, error: c.error[i] })));
  const marks = data.curves.map((c, i) => Plot.lineY(points.filter((p) => p.name === c.name),
    { x: "rank", y: "error", stroke: looks[i][0], strokeDasharray: looks[i][1], strokeWidth: 2.5 }));
  return [
    heatMaps(data.grids),
    scaleNote(data.grids),
    legend(data.curves.map((c, i) => [c.name, ...looks[i]])),
    chart("Error of the best approximation against its rank, for this matrix, noise and a change with few directions", {
      height: 300, x: { label: "rank" }, y: { label: "relative error", domain: [0, 1], tickFormat: "%", grid: true },
      marks: [...marks, ...marked(data.rank, `r = ${data.rank}`, data.rank / data.curves[0].rank.at(-1), "middle")],
    }),
  ];
}

export function draw7(data) {
  const v = data.vectors;
  const widest = Math.max(v.x.length, v.Wx.length);
  const most = Math.max(200, Math.min(820, room() - 24));
  const limit = (values) => Math.max(1e-9, [...values].map(Math.abs).sort((a, b) => a - b)[Math.floor(values.length * 0.95)]);
  const row = (title, values, of) => make("figure", {},
    make("figcaption", {}, `${title}: ${values.length} numbers`),
    strip(values, limit(of ?? values), Math.max(3, (values.length / widest) * most), `${title}, ${values.length} numbers`));
  const half = (title, ...rows) => make("div", { class: "half strips" }, make("h2", {}, title), ...rows);
  return [
    make("p", { class: "flow" }, `x is what ${data.site} reads at the last token of "${data.prompt}". Strips are as wide as their vectors; blue is negative, orange positive.`),
    half("in", row("x", v.x)),
    half("frozen path", row("W x", v.Wx)),
    half(`adapter's path: through ${v.Ax.length} numbers`, row("A x", v.Ax), row("s B A x", v.BAx, v.Wx)),
    half(`sum (computed by the model's own code, ${data.dtype})`, row("y = W x + s B A x", v.y, v.Wx)),
  ];
}

export function draw13(data) {
  const line = (values, stroke, dash) => Plot.lineY(values, { x: (_, i) => i, y: (d) => d, stroke, strokeDasharray: dash, strokeWidth: 2.5 });
  return [
    legend([["error to what is seen", css("blue"), "0"], ["distance to the truth", css("orange"), "6 4"]]),
    chart("Error of the best approximation at every rank, with the true rank marked", {
      height: 320, x: { label: "rank of B A" }, y: { label: "relative error", domain: [0, 1], tickFormat: "%", grid: true },
      marks: [
        line(data.seen, css("blue"), "0"), line(data.truth, css("orange"), "6 4"),
        ...marked(data.true_rank, `true rank ${data.true_rank}`, data.true_rank / 64),
        Plot.dot([data.rank], { x: (d) => d, y: () => data.seen[data.rank], r: 7, fill: css("blue"), stroke: css("page"), strokeWidth: 2 }),
        Plot.dot([data.rank], { x: (d) => d, y: () => data.truth[data.rank], r: 7, fill: css("orange"), stroke: css("page"), strokeWidth: 2 }),
      ],
    }),
  ];
}
