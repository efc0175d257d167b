"use strict";
// The page: its tabs, its key, and what this server can show.

import { get } from "./api.js";
import { startChat } from "./chat.js";
import "./compare.js";
import { $, element } from "./dom.js";
import { startPlan } from "./plan.js";
import { startTrain } from "./train.js";

const TABS = ["chat", "train", "plan"];

function open(name) {
  for (const tab of TABS) {
    $(`tab-${tab}`).setAttribute("aria-selected", String(tab === name));
    $(`tab-${tab}`).tabIndex = tab === name ? 0 : -1;
    $(tab).hidden = tab !== name;
  }
  document.dispatchEvent(new CustomEvent("opened", { detail: name }));
}

const wanted = () => decodeURIComponent(location.hash.slice(1)).split("/");

async function start() {
  try {
    const about = await get("page/about");
    $("key-label").hidden = true;
    const { model } = about;
    $("tab-chat").hidden = model === null;
    $("model").textContent = model === null ? "" : `${model.name}, up to ${model.length.toLocaleString("en")} tokens`;
    if (model !== null) startChat(model);
    $("recipes").replaceChildren(...about.recipes.map((value) => element("option", { value })));
    const [tab, ...run] = wanted();
    startTrain(run.join("/"));
    startPlan();
    $("tabs").hidden = $("main").hidden = false;
    open(TABS.includes(tab) && !$(`tab-${tab}`).hidden ? tab : model === null ? "train" : "chat");
  } catch (error) {
    $("model").textContent = error.message;
  }
}

function turn(event) {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step) return;
  const shown = TABS.filter((tab) => !$(`tab-${tab}`).hidden);
  const at = shown.findIndex((tab) => event.target.id === `tab-${tab}`);
  const next = shown[(at + step + shown.length) % shown.length];
  open(next);
  $(`tab-${next}`).focus();
}

for (const tab of TABS) {
  $(`tab-${tab}`).addEventListener("click", () => open(tab));
  $(`tab-${tab}`).addEventListener("keydown", turn);
}
document.addEventListener("needs-key", () => { $("key-label").hidden = false; });
$("key").addEventListener("change", () => {
  sessionStorage.setItem("key", $("key").value);
  start();
});
start();
