// Native inputs made from a picture's controls. A recorded site has the recorded positions only.

import { recorded } from "./data.js";

function positions(control) {
  if (recorded && control.kind !== "switch") return control.recorded;
  return control.kind === "steps" ? control.options : null;
}

// Read the state of a picture out of an address; what is not there, or is out of range, is the default.
export function stateOf(frame, query) {
  const state = {};
  for (const control of frame.controls) {
    const text = query.get(control.name);
    state[control.name] = text === null ? control.default : parsed(control, text);
  }
  return state;
}

function parsed(control, text) {
  if (control.kind === "switch") return text === "true";
  if (control.kind === "slider") return Number.isFinite(Number(text)) && text !== "" ? Number(text) : control.default;
  return text;
}

export function addressOf(frame, state) {
  const query = new URLSearchParams();
  for (const c of frame.controls) if (String(state[c.name]) !== String(c.default)) query.set(c.name, state[c.name]);
  const text = query.toString();
  return `#${frame.number}${text ? `?${text}` : ""}`;
}

// Draw the controls; `changed(name, value)` is called at each input.
export function drawControls(form, frame, state, changed) {
  form.replaceChildren();
  for (const control of frame.controls) {
    const id = `control-${control.name}`;
    const box = document.createElement("div");
    const label = document.createElement("label");
    label.htmlFor = id;
    const input = inputOf(control, state[control.name]);
    input.id = id;
    input.name = control.name;
    const listed = positions(control);
    const value = () => {
      if (control.kind === "switch") return input.checked;
      if (input.type === "range") return listed ? listed[Number(input.value)] : Number(input.value);
      return input.value;
    };
    if (control.kind === "switch") {
      box.className = "switch";
      label.append(input, control.label);
      box.append(label);
    } else {
      label.append(control.label);
      box.append(label, input);
    }
    const out = document.createElement("output");
    out.htmlFor = id;
    const tell = () => {
      out.textContent = String(value());
      if (listed) input.setAttribute("aria-valuetext", String(value()));
    };
    if (input.type === "range") { label.append(out); tell(); }
    if (recorded && control.recorded.length < 2) input.disabled = true;
    const event = control.kind === "text" ? "change" : "input";
    input.addEventListener(event, () => { tell(); changed(control.name, value()); });
    form.append(box);
  }
}

function inputOf(control, value) {
  const listed = positions(control);
  if (control.kind === "choice") {
    const select = document.createElement("select");
    for (const option of listed ?? control.options) select.add(new Option(option, option, false, option === value));
    return select;
  }
  const input = document.createElement("input");
  if (control.kind === "switch") {
    input.type = "checkbox";
    input.checked = value;
  } else if (control.kind === "text") {
    input.type = "text";
    input.maxLength = control.longest;
    input.value = value;
    input.readOnly = recorded;
  } else {
    input.type = "range";
    input.min = listed ? 0 : control.min;
    input.max = listed ? listed.length - 1 : control.max;
    input.step = listed ? 1 : control.step;
    input.value = listed ? Math.max(0, listed.findIndex((v) => String(v) === String(value))) : value;
  }
  return input;
}
