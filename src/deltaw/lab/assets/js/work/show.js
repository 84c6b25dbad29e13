// How the pages of adapters, diagnosis, answers and tables write numbers and draw charts and questions.

import { chart } from "../charts.js";
import { button, make } from "./ui.js";

const { d3, Plot } = globalThis;

// Seven kinds of maps by colour and by shape, so that neither is needed alone.
export const SHAPES = ["circle", "square", "triangle", "diamond", "cross", "star", "wye", "times"];

export const megabytes = (bytes) => (bytes === null || bytes === undefined ? "" : `${bytes >= 1e8 ? d3.format(",.0f")(bytes / 1e6) : (bytes / 1e6).toPrecision(3)} MB`);
export const value = (v) => (typeof v === "number" && !Number.isInteger(v) ? String(Number(v.toPrecision(4))) : String(v ?? ""));
export const metrics = (found) => make("span", {}, ...Object.entries(found ?? {}).filter(([k, v]) => k !== "step" && v !== null && typeof v !== "object")
  .map(([k, v]) => make("span", { class: "keep each" }, `${k.replaceAll("_", " ")} ${value(v)}`)));
export const day = (text) => make("time", { datetime: text ?? "", class: "keep" }, (text ?? "").slice(0, 16).replace("T", " "));
export const count = (n) => (n === null || n === undefined ? "" : d3.format(",")(n));
export const brief = (text, most = 22) => (text.length > most ? `${text.slice(0, most - 3)}...` : text);

// A chart as wide as the place it goes to, drawn again when the page's width or colours change.
export function drawn(root, title, notice, label, options) {
  const place = make("div", {});
  const figure = make("figure", { class: "plot" }, make("figcaption", {}, make("strong", {}, title), notice ? ` ${notice}` : ""), place);
  const draw = () => {
    const width = Math.max(280, Math.min(880, root.clientWidth || 640));
    place.replaceChildren(chart(label, { width, ...options(width) }));
  };
  root.append(figure);
  draw();
  return draw;
}

// Draw all again on the page's own event; gives back what leaves off.
export function again(draws) {
  const all = () => draws.forEach((draw) => draw());
  addEventListener("redraw", all);
  return () => removeEventListener("redraw", all);
}

// A question in a window of its own; resolves to true, or false where it is closed otherwise.
export function confirmed(title, parts, yes) {
  return new Promise((resolve) => {
    const box = make("dialog", { "aria-label": title }, make("h2", {}, title), ...parts);
    const close = (answer) => { box.close(); box.remove(); resolve(answer); };
    const cancel = button("Cancel", () => close(false));
    box.append(make("div", { class: "row" }, button(yes, () => close(true), { class: "main" }), cancel));
    box.addEventListener("cancel", (event) => { event.preventDefault(); close(false); });
    document.body.append(box);
    box.showModal();
  });
}

export { Plot, d3 };
