// Curves of runs: one or several lines over steps, tokens or seconds.

import { chart, css, legend, make } from "../charts.js";

const { Plot } = globalThis;
const MOST = 800;
// Told apart by colour (Okabe and Ito) and by dashes.
export const LOOKS = [["#0072b2", "0"], ["#d55e00", "7 3"], ["#009e73", "2 3"], ["#cc79a7", "10 3 2 3"],
  ["#56b4e9", "0"], ["#e69f00", "7 3"], ["#7d848e", "2 3"], ["#a6761d", "10 3 2 3"]];

// At most MOST points, evenly, with the last one.
function thinned(points) {
  if (points.length <= MOST) return points;
  const every = Math.ceil(points.length / MOST);
  return points.filter((_, i) => i % every === 0 || i === points.length - 1);
}

// `lines`: [{ name, points, y, look, dots }], drawn against `x` ("step", "tokens", "seconds").
export function curves(title, lines, { x = "step", unit = "", height = 210, width = 560, zero = false } = {}) {
  const drawn = lines.map((l) => ({ ...l, points: thinned(l.points.filter((p) => Number.isFinite(p[l.y]))) })).filter((l) => l.points.length);
  if (!drawn.length) return make("figure", { class: "curve" }, make("figcaption", {}, title), make("p", { class: "about" }, "nothing yet"));
  const last = drawn.map((l) => `${l.name} ${l.points.at(-1)[l.y].toPrecision(4)}`).join(", ");
  const marks = drawn.flatMap((l) => {
    const at = { x, y: l.y, stroke: l.look[0], strokeDasharray: l.look[1], strokeWidth: 2 };
    const few = l.dots || l.points.length < 3;
    return [Plot.lineY(l.points, at), ...(few ? [Plot.dot(l.points, { x, y: l.y, fill: l.look[0], r: 3.5 })] : [])];
  });
  const figure = make("figure", { class: "curve" }, make("figcaption", {}, title));
  if (drawn.length > 1) figure.append(legend(drawn.map((l) => [l.name, ...l.look])));
  figure.append(chart(`${title} by ${x}: last ${last}`, { width, height, marginLeft: 58, marginBottom: 40,
    x: { label: x, ticks: 5, labelOffset: 34, tickFormat: "~s" }, y: { label: unit || null, grid: true, ticks: 5, zero, tickFormat: (v) => String(Number(v.toPrecision(3))) }, marks }));
  return figure;
}

export const one = () => [css("blue"), "0"];
export const two = () => [css("orange"), "7 3"];
