// Pictures 9 and 10: a real training and real answers.

import { recorded } from "./data.js";
import { chart, css, make, ramp, short } from "./charts.js";

const { d3, Plot } = globalThis;

export function draw9(data, change) {
  const cells = data.norms.flatMap((row, step) => row.map((norm, layer) => ({ step, layer, norm })));
  const most = Math.max(1e-9, ...cells.map((c) => c.norm));
  const go = (label, step) => {
    const button = make("button", { type: "button" }, label);
    button.disabled = step < 0 || step > data.steps || step === data.step;
    button.addEventListener("click", () => change("step", step));
    return button;
  };
  return [
    make("div", { class: "row" }, go("Step", data.step + 1), go("Five steps", Math.min(data.steps, data.step + 5)), go("Back to 0", 0)),
    make("p", { role: "status" }, data.wanted ? `step ${data.step}; training goes on to step ${data.wanted}` : ""),
    chart("Norm of B A in each layer after each step; zero is the ground of the scale", {
      height: 280, marginLeft: 56, x: { type: "band", label: "step", domain: d3.range(data.steps + 1), ticks: d3.range(0, data.steps + 1, 5) }, y: { type: "band", label: "layer", labelAnchor: "top", reverse: true, domain: d3.range(data.norms[0].length), ticks: d3.range(0, data.norms[0].length, 5) },
      color: { type: "linear", domain: [0, most], interpolate: d3.interpolateViridis },
      marks: [Plot.cell(cells, { x: "step", y: "layer", fill: "norm", insetLeft: 1, shapeRendering: "crispEdges" })],
    }),
    ramp("|B A| of a layer", most > 1e-9 ? most.toPrecision(3) : "(all are 0)", d3.interpolateViridis),
    chart("Loss after each step", {
      height: 190, marginLeft: 56, x: { type: "linear", label: "step", domain: [0, data.steps] }, y: { label: "loss", zero: true, grid: true, ticks: 4 },
      marks: [Plot.lineY(data.losses, { x: (_, i) => i, y: (d) => d, stroke: css("blue"), strokeWidth: 2 }),
        Plot.dot(data.losses, { x: (_, i) => i, y: (d) => d, fill: css("orange"), r: 4 })],
    }),
    make("p", { class: "flow" }, `it learns: ${data.rows.join("; ")}`),
  ];
}

export function draw10(data, change, ask) {
  const buttons = data.adapters.map((a) => {
    const button = make("button", { type: "button", "aria-pressed": String(a.name === data.adapter) },
      a.name === "base" ? "base alone" : a.name === "lesson" ? `lesson (picture 9${data.lesson === null ? "" : `, step ${data.lesson}`})` : a.name,
      make("small", {}, a.numbers ? ` ${short(a.numbers)} numbers` : ""));
    button.addEventListener("click", () => change("adapter", a.name));
    return button;
  });
  const drawn = [make("div", { class: "row" }, ...buttons)];
  if (!recorded) {
    const button = make("button", { type: "button", id: "ask" }, "Ask");
    button.addEventListener("click", ask);
    drawn.push(make("div", { class: "row" }, button));
  }
  const say = (title, text) => make("figure", {}, make("figcaption", {}, title), make("blockquote", {}, text ?? "Press Ask."));
  drawn.push(make("div", { class: "answers" }, say(`base alone: ${data.prompt}`, data.base),
    say(data.adapter === "base" ? "(choose an adapter)" : `${data.adapter}${data.merged ? ", merged" : ", beside the base"}: ${data.prompt}`, data.answer)));
  return drawn;
}
