// Inputs for a recipe, made from the fields that the server reads out of the schemas (forms.py). Nothing here knows a method.

import { make } from "./ui.js";

const shown = (value) => (value === null || value === undefined ? "" : typeof value === "object" && !Array.isArray(value)
  ? (Object.keys(value).length ? JSON.stringify(value) : "") : Array.isArray(value) ? value.join(", ") : String(value));
const same = (a, b) => JSON.stringify(a ?? null) === JSON.stringify(b ?? null);

// What a text means: undefined is the default. A number that is none stays a text, and the library says what is wrong.
function parsed(field, text) {
  const bare = text.trim();
  if (field.kind === "text") return text === "" && field.nullable ? undefined : text;
  if (bare === "") return field.nullable || field.kind === "list" || field.kind === "map" ? undefined : "";
  if (field.kind === "whole" || field.kind === "number") return Number.isFinite(Number(bare)) ? Number(bare) : bare;
  if (field.kind === "map") { try { return JSON.parse(bare); } catch { return bare; } }
  if (field.kind === "names" && (/[()[\]|*\\]/.test(bare) || !bare.includes(","))) return bare;
  return bare.split(",").map((part) => part.trim()).filter(Boolean)
    .map((part) => (Number.isFinite(Number(part)) ? Number(part) : part));
}

function hint(field) {
  const told = [field.about && `${field.about[0].toUpperCase()}${field.about.slice(1)}${field.about.endsWith(".") ? "" : "."}`];
  if (field.min !== undefined) told.push(`At least ${field.min}${field.below !== undefined ? `, below ${field.below}` : ""}.`);
  if (field.kind === "names" || field.kind === "list") told.push("Several: with commas.");
  if (field.kind === "map") told.push('As {"q_proj": 8}.');
  return told.filter(Boolean).join(" ");
}

// One field; `values` is a Map from path to what differs from the default, `changed()` is called when it does.
export function inputOf(field, values, changed) {
  const id = `field-${field.path.replaceAll(".", "-")}`;
  const given = values.has(field.path) ? values.get(field.path) : field.default;
  let input;
  const keep = (value) => {
    if (value === undefined || same(value, field.default)) values.delete(field.path);
    else values.set(field.path, value);
    box.classList.toggle("differs", values.has(field.path));
    changed(field.path);
  };
  if (field.kind === "choice") {
    input = make("select");
    for (const option of field.options) input.add(new Option(option ?? "none", String(option), false, same(option, given)));
    input.addEventListener("change", () => keep(field.options.find((o) => String(o) === input.value)));
  } else if (field.kind === "switch") {
    input = make("input", { type: "checkbox" });
    input.checked = Boolean(given);
    input.addEventListener("change", () => keep(input.checked));
  } else {
    const number = field.kind === "whole" || field.kind === "number";
    input = make("input", { type: "text", autocomplete: "off", spellcheck: "false", inputmode: number ? "decimal" : null,
      placeholder: field.nullable ? "none" : null });
    input.value = shown(given);
    // A half-typed path would be looked for, a half-typed hub id asked for: words count when they are finished.
    input.addEventListener(number ? "input" : "change", () => keep(parsed(field, input.value)));
  }
  input.id = id;
  input.name = field.path;
  input.setAttribute("aria-describedby", `${id}-hint ${id}-wrong`);
  const label = make("label", { for: id }, field.name);
  const about = make("small", { id: `${id}-hint` }, hint(field));
  const wrong = make("small", { id: `${id}-wrong`, class: "wrong" });
  const box = make("div", { class: field.kind === "switch" ? "field tick" : "field" },
    ...(field.kind === "switch" ? [input, label] : [label, input]), about, wrong);
  box.classList.toggle("differs", values.has(field.path));
  return box;
}

// Put a sentence at the fields that it is about; no fields: take all such sentences away. Tells whether one was found.
export function blame(root, paths = [], sentence = "") {
  let found = false;
  for (const input of root.querySelectorAll("[name]")) {
    const bad = paths.includes(input.name);
    if (bad) {
      input.setAttribute("aria-invalid", "true");
      for (let part = input.closest("details"); part; part = part.parentElement.closest("details")) part.open = true;
    } else input.removeAttribute("aria-invalid");
    const wrong = document.getElementById(`${input.id}-wrong`);
    if (wrong) wrong.textContent = bad ? sentence : "";
    found ||= bad;
  }
  return found;
}

// A part of the form that opens: how many of its settings differ is told in its title.
export function section(title, about, fields, values, changed, open = false) {
  const count = make("small");
  const tell = () => {
    const n = fields.filter((f) => values.has(f.path)).length;
    count.textContent = n ? ` ${n} changed` : "";
  };
  const part = make("details", { class: "section" }, make("summary", {}, title, count),
    ...(about ? [make("p", { class: "about" }, about)] : []),
    make("div", { class: "fields" }, ...fields.map((f) => inputOf(f, values, (path) => { tell(); changed(path); }))));
  part.open = open;
  tell();
  return part;
}

// What differs, as a recipe: nested, with the method always named.
export function recipeOf(method, values) {
  const recipe = { base: {}, adapter: { method } };
  for (const [path, value] of values) {
    const names = path.split(".");
    let place = recipe;
    for (const name of names.slice(0, -1)) place = place[name] ??= {};
    place[names.at(-1)] = value;
  }
  return recipe;
}

// The other way: a recipe's settings by path. A word alone stands for a base's path or an optimizer's name.
export function valuesOf(recipe, paths) {
  const values = new Map();
  const walk = (part, path) => {
    for (const [name, value] of Object.entries(part)) {
      const where = path ? `${path}.${name}` : name;
      if (paths.has(where)) values.set(where, value);
      else if (value && typeof value === "object" && !Array.isArray(value)) walk(value, where);
      else if (paths.has(`${where}.path`)) values.set(`${where}.path`, value);
      else if (paths.has(`${where}.name`)) values.set(`${where}.name`, value);
    }
  };
  walk(recipe, "");
  return values;
}
