// Pictures 3 and 12: a transformer block and what sits in it.

import { css, KINDS, legend, make } from "./charts.js";

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

export function draw3(data, change) {
  const drawn = [make("p", { class: "flow" }, "hidden state in")];
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
    make("div", { class: "half" }, make("h2", {}, "in front of the sequence"), make("div", { class: "parts" }, box("virtual tokens", "learned vectors, or keys and values", "front")))];
  const ends = ["after attention", "after ffn"];
  [...halves(data.parts)].forEach(([half, parts], i) => {
    const boxes = parts.map((p) => box(p.role, `W ${p.out} x ${p.in}`, p.role));
    if (ends[i]) boxes.push(box("behind this half", "a bottleneck in series", ends[i]));
    drawn.push(make("div", { class: "half" }, make("h2", {}, `block 0: ${half}`), make("div", { class: "parts" }, ...boxes)));
  });
  if (data.methods.some((m) => m.places.norms)) drawn.push(make("div", { class: "parts" }, box("norms", "their biases", "norms")));
  return drawn;
}
