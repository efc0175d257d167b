"use strict";
// What a model costs before anybody has it. All arithmetic is the server's.

import { post } from "./api.js";
import { $, element, table, tell } from "./dom.js";

const WAIT = 120;
const state = { asked: 0, timer: null, model: null, choices: {} };

const doublings = (most, from = 1) => {
  const found = [];
  for (let value = from; value < most; value *= 2) found.push(value);
  return [...found, most];
};

const chosen = (id) => state.choices[id]?.[Number($(id).value)];

// A slider over a list of values, which begins at the model's own one.
function slider(id, values, own) {
  state.choices[id] = values;
  $(id).max = values.length - 1;
  $(id).value = Math.max(0, values.indexOf(own));
  $(id).disabled = values.length < 2;
  name(id);
}

function name(id) {
  const value = chosen(id);
  $(`${id}-name`).textContent = value === undefined ? "-" : value.toLocaleString("en");
  $(id).setAttribute("aria-valuetext", $(`${id}-name`).textContent);
}

function sliders({ length, experts, experts_per_token: top }) {
  const around = (own) => [...new Set([...doublings(own), ...doublings(own * 8, own)])].filter((value) => value > 1);
  slider("context", doublings(length, Math.min(128, length)), length);
  slider("batch", doublings(1024), 1);
  slider("processes", doublings(128), 1);
  slider("experts", experts ? around(experts) : [], experts);
  slider("top", experts ? Array.from({ length: Math.min(experts, Math.max(32, top)) }, (_, i) => i + 1) : [], top);
}

function body(model) {
  const asked = { model, dtype: $("plan-dtype").value, gigabytes_per_second: Number($("plan-speed").value) || 50 };
  if (state.model !== model) return asked;
  const steered = { context: "context", batch: "batch", processes: "processes", experts: "experts", experts_per_token: "top" };
  for (const [field, id] of Object.entries(steered)) {
    const value = chosen(id);
    if (value !== undefined) asked[field] = value;
  }
  return asked;
}

function draw({ tables, sentence }) {
  $("plan-view").replaceChildren(
    ...(sentence ? [element("p", { className: "all" }, element("strong", {}, sentence))] : []),
    ...tables.map(({ title, rows, note }) => element(
      "div",
      { className: "card" },
      element("h3", {}, title),
      table(null, rows, true),
      ...(note ? [element("p", { className: "note" }, note)] : []),
    )),
  );
}

async function plan() {
  const number = (state.asked += 1);
  const model = $("plan-model").value.trim();
  if (!model) return;
  try {
    const found = await (await post("page/plan", body(model))).json();
    if (number !== state.asked) return;
    if (state.model !== model) {
      state.model = model;
      sliders(found.own);
    }
    draw(found);
    tell("plan-status", found.name);
  } catch (error) {
    if (number === state.asked) tell("plan-status", error);
  }
}

function soon() {
  clearTimeout(state.timer);
  state.timer = setTimeout(plan, WAIT);
}

export function startPlan() {
  document.addEventListener("opened", (event) => {
    if (event.detail === "plan" && state.model === null) plan();
  });
}

$("plan-ask").addEventListener("input", (event) => {
  if (state.choices[event.target.id]) name(event.target.id);
  soon();
});
$("plan-ask").addEventListener("submit", (event) => {
  event.preventDefault();
  plan();
});
