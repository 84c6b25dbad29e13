// Pictures 3 and 12: a transformer block and what sits in it.

import { css, KINDS, legend, make, room } from "./charts.js";

function halves(parts) {
  const found = new Map();
  for (const part of parts) found.set(part.half, [...(found.get(part.half) ?? []), part]);
  return found;
}

function swatch(colour) {
  const node = make("span", { class: "swatch" });
  node.style.background = colour;
  return node;
}

// One map: x through W, and beside it through A and B; or through W' alone. Heights of boxes are their widest side.
function wiring(part, merged, rank) {
  const larger = room() < 500 ? 1.6 : 1; // the drawing shrinks with a narrow page, its words do not
  const size = 16 * larger, less = 13 * larger;
  const svg = globalThis.d3.create("svg").attr("viewBox", "0 0 640 190").attr("width", 640).attr("role", "img").attr("font-size", size)
    .attr("aria-label", merged ? `${part.role} merged: y = W' x` : `${part.role}: y = W x + s B A x, a thin path beside W`);
  const line = (x1, y1, x2, y2) => svg.append("line").attr("x1", x1).attr("y1", y1).attr("x2", x2).attr("y2", y2)
    .attr("stroke", css("text")).attr("stroke-width", 1.5);
  const box = (x, y, w, h, colour, label, small) => {
    svg.append("rect").attr("x", x).attr("y", y).attr("width", w).attr("height", h).attr("rx", 4)
      .attr("fill", css("page")).attr("stroke", colour).attr("stroke-width", 2.5);
    svg.append("text").attr("x", x + w / 2).attr("y", y + h / 2 - 10 * (larger - 1)).attr("text-anchor", "middle").text(label);
    svg.append("text").attr("x", x + w / 2).attr("y", y + h / 2 - 10 * (larger - 1) + 18 * larger).attr("text-anchor", "middle").attr("font-size", less).text(small);
  };
  const y = merged ? 95 : 52;
  line(40, y, larger > 1 ? 522 : 560, y);
  svg.append("text").attr("x", 22).attr("y", y + 5).text("x");
  svg.append("text").attr("x", 638).attr("y", y + 5).attr("text-anchor", "end").text(merged ? "y = W' x" : "y = sum");
  box(190, y - 42, 210, 84, css("grey"), merged ? "W' = W + s B A" : "W, frozen", `${part.out} x ${part.in}`);
  if (merged) return svg.node();
  for (const [x1, y1, x2, y2] of [[80, y, 80, 150], [80, 150, 500, 150], [500, 150, 500, y]]) line(x1, y1, x2, y2);
  box(140, 122, 110, 56, css("orange"), "A", `${rank} x ${part.in}`);
  box(340, 122, 110, 56, css("orange"), "B", `${part.out} x ${rank}`);
  svg.append("text").attr("x", 295).attr("y", 143).attr("text-anchor", "middle").attr("font-size", less).text(`${rank} wide`);
  svg.append("circle").attr("cx", 500).attr("cy", y).attr("r", 11).attr("fill", css("page")).attr("stroke", css("text"));
  svg.append("text").attr("x", 500).attr("y", y + 5).attr("text-anchor", "middle").text("+");
  return svg.node();
}

export function draw3(data, change) {
  const drawn = [wiring(data.parts.find((p) => p.role === data.part), data.merged, data.rank), make("p", { class: "flow" }, "the block: hidden state in")];
  for (const [half, parts] of halves(data.parts)) {
    const buttons = parts.map((part) => {
      const button = make("button", { type: "button", class: "part", "aria-pressed": String(part.role === data.part) },
        part.role, make("small", {}, `W ${part.out} x ${part.in}`));
      const lit = make("span", { class: "lit" });
      if (data.merged) lit.append(swatch(css("grey")), "W' = W + s B A");
      else lit.append(swatch(css("orange")), `+ B ${part.B[0]} x ${part.B[1]}, A ${part.A[0]} x ${part.A[1]}`);
      button.append(lit);
      button.addEventListener("click", () => change("part", part.role));
      return button;
    });
    drawn.push(make("div", { class: "half" }, make("h2", {}, `${half} (its sum is added to the hidden state)`), make("div", { class: "parts" }, ...buttons)));
  }
  drawn.push(make("p", { class: "flow" }, data.merged
    ? "hidden state out: one product a map, as in the base" : "hidden state out: beside each W a thin path of rank " + data.rank));
  return drawn;
}

export function draw12(data) {
  const colour = Object.fromEntries(["lora", "dora", "houlsby", "prefix", "prompt", "ia3", "bitfit"].map((k, i) => [k, KINDS[[3, 2, 5, 0, 1, 4, 8][i]]]));
  const lit = (place) => data.methods.filter((m) => m.places[place]).map((m) =>
    make("span", { class: "lit" }, swatch(colour[m.key]), `${m.label}: ${m.places[place].toLocaleString("en")}`));
  const box = (title, small, place) => {
    const marks = lit(place);
    const node = make("div", { class: "part" }, title, make("small", {}, small), ...marks);
    if (marks.length) node.style.borderColor = css("orange");
    return node;
  };
  const drawn = [legend(data.methods.map((m) => [m.label, colour[m.key]])),
    make("div", { class: "half" }, make("h2", {}, "in front of the sequence"), make("div", { class: "parts" }, box("virtual tokens", "learned vectors, or keys and values of all blocks", "front")))];
  const ends = ["after attention", "after ffn"];
  [...halves(data.parts)].forEach(([half, parts], i) => {
    const boxes = parts.map((p) => box(p.role, `W ${p.out} x ${p.in}`, p.role));
    if (ends[i]) boxes.push(box("behind this half", "a bottleneck in series", ends[i]));
    drawn.push(make("div", { class: "half" }, make("h2", {}, `block 0: ${half}`), make("div", { class: "parts" }, ...boxes)));
  });
  if (data.methods.some((m) => m.places.norms)) drawn.push(make("div", { class: "parts" }, box("norms", "their biases", "norms")));
  return drawn;
}
