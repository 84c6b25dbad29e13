// The page: one picture, or one page of the workbench, at a time; its state in the address, numbers from the library.

import { addressOf, drawControls, stateOf } from "./controls.js";
import * as data from "./data.js";
import { draw3, draw12 } from "./blocks.js";
import { draw2, draw4, draw5, draw8, draw11 } from "./counts.js";
import { draw9, draw10 } from "./live.js";
import { draw1, draw6, draw7, draw13 } from "./weights.js";

const DRAW = { 1: draw1, 2: draw2, 3: draw3, 4: draw4, 5: draw5, 6: draw6, 7: draw7, 8: draw8, 9: draw9, 10: draw10, 11: draw11, 12: draw12, 13: draw13 };
const $ = (id) => document.getElementById(id);

let frames = [];
let frame = null;
let state = {};
let last = null;
let asked = null;
let pages = [];
let turn = 0;
let leave = null;

function theme() {
  const kept = localStorage.getItem("theme");
  if (kept) document.documentElement.dataset.theme = kept;
  $("theme").addEventListener("click", () => {
    const dark = document.documentElement.dataset.theme
      ? document.documentElement.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    document.documentElement.dataset.theme = dark ? "light" : "dark";
    localStorage.setItem("theme", document.documentElement.dataset.theme);
    redraw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
}

function words() {
  $("title").textContent = `${frame.number}. ${frame.title}`;
  document.title = `${frame.number}. ${frame.title} - deltaw lab`;
  $("notice").textContent = frame.notice;
  $("formula").querySelector("code").textContent = frame.formula;
  $("misconception").querySelector("q").textContent = frame.misconception;
  $("misconception").querySelector("span").textContent = frame.cure;
  $("question").open = false;
  $("question").querySelector("summary").textContent = frame.question;
  $("question").querySelector("p").textContent = frame.answer;
}

// Which link is marked in the two lists.
function mark(current) {
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${current}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
}

function numbers(found) {
  const known = new Map([...$("numbers").children].map((box) => [box.dataset.key, box]));
  $("numbers").replaceChildren(...found.map((n) => {
    const box = known.get(n.key) ?? document.createElement("div");
    if (!box.children.length) box.append(document.createElement("dt"), document.createElement("dd"));
    box.dataset.key = n.key;
    box.firstChild.textContent = n.label;
    box.lastChild.textContent = n.shown;
    return box;
  }));
}

function redraw() {
  dispatchEvent(new Event("redraw"));
  if (!last) return;
  const focused = document.activeElement?.closest("#drawing") ? [...$("drawing").querySelectorAll("button")].indexOf(document.activeElement) : -1;
  $("drawing").replaceChildren(...DRAW[frame.number](last.data, change, () => show(true)));
  if (focused >= 0) $("drawing").querySelectorAll("button")[focused]?.focus();
}

// One answer; of picture 9 what is there, and then each step as it is made, up to the one that is asked for; of a
// picture that names what is still made (pending), what is there, and more until all is.
async function* answers(act, signal) {
  const trains = frame.number === 9 && act;
  let found = await data.picture(frame, state, { act: act && !trains, signal });
  while (trains && found.data.step < state.step) {
    found.data.wanted = state.step;
    yield found;
    found = await data.picture(frame, { ...state, step: found.data.done + 1 }, { act: true, signal });
  }
  for (let left = -1; found.data.pending?.length; found = await data.picture(frame, state, { signal })) {
    if (found.data.pending.length !== left) yield found;
    left = found.data.pending.length;
  }
  yield found;
}

async function show(act) {
  asked?.abort();
  const mine = (asked = new AbortController());
  const late = setTimeout(() => $("drawing").classList.add("waiting"), 150);
  document.body.setAttribute("aria-busy", "true");
  try {
    for await (const found of answers(act, mine.signal)) {
      if (asked !== mine) return;
      clearTimeout(late);
      $("drawing").classList.remove("waiting");
      last = found;
      $("problem").hidden = true;
      numbers(found.numbers);
      redraw();
    }
  } catch (problem) {
    if (problem.name === "AbortError" || asked !== mine) return;
    $("problem").textContent = problem.message;
    $("problem").hidden = false;
  } finally {
    clearTimeout(late);
    if (asked === mine) {
      $("drawing").classList.remove("waiting");
      document.body.setAttribute("aria-busy", "false");
    }
  }
}

// Picture 9 trains as far as its slider says; picture 10 answers when it is asked to.
const acts = () => frame.number === 9 && state.step > 0;

// Another rank or rate of picture 9 is another lesson, which has not begun.
function begin() {
  state.step = 0;
  const step = $("control-step");
  step.value = 0;
  step.labels[0].querySelector("output").textContent = "0";
}

function change(name, value) {
  state = { ...state, [name]: value };
  if (frame.number === 9 && name !== "step") begin();
  history.replaceState(null, "", addressOf(frame, state));
  if (document.activeElement?.name !== name) drawControls($("controls"), frame, state, change);
  show(acts());
}

// Leave what is shown: a picture that is computed, or a page with what it holds open.
function clear(work) {
  turn += 1;
  asked?.abort();
  leave?.();
  leave = null;
  last = null;
  $("work").replaceChildren();
  $("problem").hidden = true;
  $("work").hidden = !work;
  for (const part of document.querySelectorAll("main > .bench, main > .words")) part.hidden = work;
}

// A page of the workbench: `page.show(root, rest, query)` draws it, and may give back how to leave it.
async function open(page, rest, query) {
  clear(true);
  frame = null;
  const mine = turn;
  mark(page.address);
  $("title").textContent = page.title;
  $("notice").textContent = page.notice ?? "";
  document.title = `${page.title} - deltaw lab`;
  document.body.setAttribute("aria-busy", "true");
  const root = document.createElement("div");
  $("work").append(root);
  try {
    const done = await page.show(root, rest, query);
    if (mine === turn) leave = done ?? null;
    else done?.();
  } catch (problem) {
    if (mine === turn) root.append(sentence(problem));
  } finally {
    if (mine === turn) document.body.setAttribute("aria-busy", "false");
  }
}

function sentence(problem) {
  const told = document.createElement("p");
  told.className = "problem";
  told.setAttribute("role", "alert");
  told.textContent = problem.message;
  return told;
}

// A part of an address as it was written; what is no such writing stands for itself.
function plain(text) {
  try { return decodeURIComponent(text); } catch { return text; }
}

function route() {
  const [number, query] = location.hash.slice(1).split("?");
  const [address, ...rest] = number.split("/");
  const page = pages.find((p) => p.address === address);
  if (page) {
    open(page, plain(rest.join("/")), new URLSearchParams(query ?? ""));
    return;
  }
  const found = frames.find((f) => String(f.number) === number) ?? frames[0];
  const other = frame !== found;
  if (!frame) clear(false);
  frame = found;
  mark(frame.number);
  state = stateOf(frame, new URLSearchParams(query ?? ""));
  if (other) {
    last = null;
    $("drawing").replaceChildren();
    $("numbers").replaceChildren();
    words();
  }
  drawControls($("controls"), frame, state, change);
  show(acts());
}

function linked(address, number, title) {
  const link = document.createElement("a");
  link.href = `#${address}`;
  if (number) {
    link.dataset.number = number;
    link.append(`${number} `);
  }
  const name = document.createElement("span");
  name.className = "name";
  name.textContent = title;
  link.append(name);
  link.setAttribute("aria-label", `${number} ${title}`.trim());
  const item = document.createElement("li");
  item.append(link);
  return item;
}

// The workbench's pages; a recorded site has none.
async function workbench() {
  pages = (await import("./work/pages.js")).PAGES;
  $("work-list").replaceChildren(...pages.map((p) => linked(p.address, "", p.title)));
  $("work-nav").hidden = !pages.length;
}

async function start() {
  theme();
  const every = await data.frames();
  frames = every.pictures;
  if (every.workbench) await workbench();
  $("base").textContent = `on ${every.base}${every.recorded ? ", recorded" : ""}`;
  $("controls").addEventListener("submit", (event) => event.preventDefault());
  $("list").replaceChildren(...frames.map((f) => linked(f.number, f.number, f.title)));
  addEventListener("hashchange", route);
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; redraw(); } });
  route();
}

start().catch((problem) => {
  $("problem").textContent = problem.message;
  $("problem").hidden = false;
});
