"use strict";
// A training run as its folder tells of it, while it goes on and after: curves, loads, alarms in words.

import { ask, get } from "./api.js";
import { $, element, tell } from "./dom.js";

const LIST_SECONDS = 5;
const LEAST_SECONDS = 1;
// A look may cost the server, which trains beside, no more than this share of its time.
const SHARE = 0.05;
// Charts above the loads: how well it learns comes first.
const FIRST = 2;

const state = { open: false, wanted: "", etag: null, timer: null, listed: 0, asking: false };

const card = (title, ...inside) => element("div", { className: "card" }, ...(title ? [element("h3", {}, title)] : []), ...inside);

// Pictures come from the server that this page came from, which escapes what it did not write; no script runs in them.
function picture(svg) {
  const made = element("template");
  made.innerHTML = svg;
  return made.content;
}

function tile({ label, value, note, tone }) {
  const part = (className, text) => element("div", { className }, text);
  return element("div", { className: `tile ${tone}` }, part("label", label), part("number", value), part("note", note));
}

const grid = (name, parts) => (parts.length ? [element("div", { className: name }, ...parts)] : []);

function draw(found) {
  const charts = found.charts.map(({ title, svg }) => card(title, picture(svg)));
  const strips = found.loads.map(({ run, pictures }) => card(run, ...pictures.map(picture)));
  const samples = found.samples.map(({ run, prompt, text }) => card(run, element("pre", {}, element("b", {}, prompt), text)));
  $("run-view").replaceChildren(
    ...grid("tiles", found.tiles.map(tile)),
    ...found.alarms.map((text) => element("p", { className: "notice" }, text)),
    ...found.balance.map((text) => element("p", { className: "verdict" }, text)),
    ...grid("two", charts.slice(0, FIRST)),
    ...(strips.length ? [element("h2", {}, found.loads_title), element("div", { className: "key" }, picture(found.loads_key))] : []),
    ...grid(strips.length > 1 ? "two" : "stack", strips),
    ...grid("two", charts.slice(FIRST)),
    ...(samples.length ? [element("h2", {}, found.samples_title)] : []),
    ...grid("stack", samples),
  );
}

async function list() {
  const { folder, runs } = await get("page/runs");
  const chosen = $("run").value || state.wanted;
  const fill = (select, first, value) => {
    const options = runs.map(({ name, state: how }) => element("option", { value: name }, `${name} (${how})`));
    select.replaceChildren(...first, ...options);
    select.value = value;
  };
  fill($("run"), [], runs.some(({ name }) => name === chosen) ? chosen : runs[0]?.name ?? "");
  fill($("beside"), [element("option", { value: "" }, "none")], $("beside").value);
  if (!$("beside").value) $("beside").value = "";
  state.listed = performance.now();
  if (!runs.length) {
    $("run-view").replaceChildren();
    tell("run-status", folder === null
      ? "no folder of runs: consilium serve MODEL --runs DIR names one" : `no runs in ${folder} yet`);
  }
}

// How long to wait until the next look.
async function look() {
  if (performance.now() - state.listed > 1000 * LIST_SECONDS || !$("run").value) await list();
  const name = $("run").value;
  if (!name) return LIST_SECONDS;
  const path = name.split("/").map(encodeURIComponent).join("/");
  const beside = $("beside").value && $("beside").value !== name ? `?beside=${encodeURIComponent($("beside").value)}` : "";
  const headers = state.etag ? { "If-None-Match": state.etag } : {};
  const answer = await ask(`page/runs/${path}${beside}`, { headers, cache: "no-store" });
  if (answer.status === 304) return LEAST_SECONDS;
  const found = await answer.json();
  if (name !== $("run").value) return 0;
  state.etag = answer.headers.get("ETag");
  draw(found);
  tell("run-status", found.state);
  return Math.max(LEAST_SECONDS, found.seconds / SHARE);
}

async function keepLooking() {
  clearTimeout(state.timer);
  if (!state.open || state.asking) return;
  state.asking = true;
  let wait = LIST_SECONDS;
  try {
    wait = await look();
  } catch (error) {
    $("run-view").replaceChildren();
    state.etag = null;
    tell("run-status", error);
  } finally {
    state.asking = false;
  }
  state.timer = setTimeout(keepLooking, 1000 * wait);
}

function chosen() {
  state.etag = null;
  keepLooking();
}

export function startTrain(wanted) {
  state.wanted = wanted;
}

$("run").addEventListener("change", chosen);
$("beside").addEventListener("change", chosen);
document.addEventListener("opened", (event) => {
  state.open = event.detail === "train";
  keepLooking();
});
