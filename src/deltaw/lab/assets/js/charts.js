// Heat maps on canvas, charts by Observable Plot, both in colours of this page. d3 and Plot are globals (vendored).

const { d3, Plot } = globalThis;

export const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

export function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") node.className = value;
    else if (value !== null && value !== undefined) node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}

// Blue below zero, orange above, the page's own ground at zero: told apart by every kind of colour vision.
function diverging() {
  const ground = css("page");
  const low = d3.interpolateLab(ground, css("blue"));
  const high = d3.interpolateLab(ground, css("orange"));
  return (t) => d3.rgb(t < 0 ? low(-t) : high(t));
}

function paint(canvas, rows, columns, cells) {
  canvas.width = columns;
  canvas.height = rows;
  const context = canvas.getContext("2d");
  const image = context.createImageData(columns, rows);
  const colour = diverging();
  const table = d3.range(-127, 128).map((v) => colour(v / 127));
  cells.forEach((v, i) => {
    const { r, g, b } = table[v + 127];
    image.data.set([r, g, b, 255], 4 * i);
  });
  context.putImageData(image, 0, 0);
}

export function heatMaps(grids) {
  return make("div", { class: "grids" }, ...grids.map((grid) => {
    const label = `${grid.title}: ${grid.rows} x ${grid.columns} numbers, colours from -${grid.limit.toPrecision(2)} to ${grid.limit.toPrecision(2)}`;
    const canvas = make("canvas", { role: "img", "aria-label": label });
    paint(canvas, grid.rows, grid.columns, grid.cells);
    return make("figure", {}, make("figcaption", {}, grid.title), canvas);
  }));
}

// What the colours of heat maps stand for: a bar for each range of values, with the maps that have it.
export function scaleNote(grids) {
  const ranges = d3.group(grids, (g) => g.limit.toPrecision(2));
  return make("div", { class: "scales" }, ...[...ranges].map(([limit, those]) => {
    const names = ranges.size > 1 ? `${those.map((g) => g.title.split(":")[0]).join(", ")}: ` : "";
    const bar = make("canvas", { "aria-hidden": "true" });
    paint(bar, 1, 255, d3.range(-127, 128));
    return make("p", { class: "flow" }, `${names}-${limit}`, bar, `+${limit}`);
  }));
}

// The same for a scale that begins at zero; `colour(t)` for t from 0 to 1.
export function ramp(name, most, colour) {
  const bar = make("canvas", { "aria-hidden": "true", width: 128, height: 1 });
  const context = bar.getContext("2d");
  d3.range(128).forEach((i) => { context.fillStyle = colour(i / 127); context.fillRect(i, 0, 1, 1); });
  return make("div", { class: "scales" }, make("p", { class: "flow" }, `${name}: 0`, bar, most));
}

// A vector as a strip of colours, `width` pixels wide.
export function strip(values, limit, width, label) {
  const canvas = make("canvas", { role: "img", "aria-label": label });
  paint(canvas, 1, values.length, values.map((v) => Math.round(Math.max(-1, Math.min(1, v / (limit || 1))) * 127)));
  canvas.style.width = `${width}px`;
  canvas.style.height = "22px";
  return canvas;
}

// Pixels that a drawing may be wide.
export const room = () => document.getElementById("drawing").clientWidth || 640;

// Text over lines: a rim in the page's colour keeps it readable.
export const rimmed = () => ({ fill: css("text"), stroke: css("page"), strokeWidth: 6 });

// A dashed line at `x` with `words` beside it, on the side that has room; `share`: how far to the right x lies, 0 to 1.
export const marked = (x, words, share, frameAnchor = "top") => [
  Plot.ruleX([x], { stroke: css("text"), strokeDasharray: "2 4" }),
  Plot.text([x], { x: (d) => d, frameAnchor, text: () => words, dx: share > 0.7 ? -6 : 6, dy: 24, textAnchor: share > 0.7 ? "end" : "start", ...rimmed() }),
];

// Plot writes a <style> of its own, which the page's policy does not allow; lab.css has the rules.
export function chart(label, options) {
  const width = Math.max(280, Math.min(880, room() / (options.columns ?? 1)));
  const x = { labelOffset: 40, ...options.x };
  const drawn = Plot.plot({ width, marginBottom: 48, style: { background: "transparent", fontSize: "13px" }, ...options, x });
  for (const style of drawn.querySelectorAll("style")) style.remove();
  const svg = drawn.tagName.toLowerCase() === "svg" ? drawn : drawn.querySelector("svg");
  for (const part of svg.querySelectorAll("[aria-label], [aria-description]")) { // one picture, with one name
    part.removeAttribute("aria-label");
    part.removeAttribute("aria-description");
  }
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", label);
  return make("div", { class: "chart" }, drawn);
}

export function legend(entries) {
  return make("ul", { class: "legend" }, ...entries.map(([name, colour, dash]) => {
    const mark = d3.create("svg").attr("width", 22).attr("height", 12).attr("aria-hidden", "true");
    if (dash === undefined) mark.append("rect").attr("width", 22).attr("height", 12).attr("fill", colour);
    else mark.append("line").attr("x2", 22).attr("y1", 6).attr("y2", 6).attr("stroke", colour)
      .attr("stroke-width", 3).attr("stroke-dasharray", dash);
    return make("li", {}, mark.node(), name);
  }));
}

// A table: `columns` are [title, value(row), "number"?]; a value is text or an element. It scrolls in a box of its own.
export function table(caption, columns, rows) {
  const head = columns.map(([title, , kind]) => make("th", { scope: "col", class: kind }, title));
  const body = rows.map((row) => make("tr", {}, ...columns.map(([, value, kind]) => make("td", { class: kind }, value(row) ?? ""))));
  return make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    make("table", {}, make("caption", {}, caption), make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...body)));
}

export const short = (n) => d3.format(n >= 1e4 ? ".3~s" : ",")(n).replace("G", " B").replace("M", " M").replace("k", " k").replace("T", " T");
// Okabe and Ito's palette, for up to eight kinds.
export const KINDS = ["#0072b2", "#56b4e9", "#e69f00", "#d55e00", "#cc79a7", "#009e73", "#f0e442", "#7d848e", "#a6761d", "#4d4d9f", "#999999"];
