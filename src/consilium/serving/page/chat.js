"use strict";
// One conversation with the model that this server serves, and which experts computed it.

import { generate, nothing } from "./api.js";
import { chipOf, paint, repaint, Strip, view, walkable } from "./chips.js";
import { DOMAINS, domainHue, measure } from "./domains.js";
import { $, download, element, tell } from "./dom.js";
import { Counts, Heat, note } from "./heat.js";
import { show } from "./token.js";

const state = { model: null, served: null, messages: [], answers: [], muted: [], stop: null, counts: new Counts() };
const heat = new Heat($("heat"), "Loads of this conversation");

export function learnLayers(layers) {
  if (view.layers.length || !layers.length) return;
  view.layers = layers;
  $("layer").max = layers.length - 1;
  nameLayer();
}

const nameLayer = () => { $("layer-name").textContent = view.layers[view.layer] ?? "-"; };

const drawHeat = () => heat.show(state.counts.layers, state.counts.shares(), note(state.counts));

function turn(role) {
  const text = element("div", { className: "text" });
  $("talk").append(element("div", { className: "turn" }, element("h4", {}, role), text));
  return text;
}

const follow = () => { $("talk").scrollTop = $("talk").scrollHeight; };

// What an answer shows: the prompt as the model read it, folded, and its own tokens.
function listener() {
  const prompt = element("div", { className: "text" });
  $("talk").append(element("details", { className: "turn" }, element("summary", {}, "the prompt as the model reads it"), prompt));
  const strips = { prompt: new Strip(prompt), own: new Strip(turn(describe()), follow) };
  let drawn = 0;
  return {
    layers(layers) {
      learnLayers(layers);
      state.counts.learn(layers);
    },
    tokens(tokens) {
      strips[tokens[0]?.prompt ? "prompt" : "own"].add(tokens);
    },
    routed(tokens) {
      const known = tokens.filter((one) => one.experts);
      state.counts.add(known);
      paint(known);
      if (performance.now() - drawn < 250) return;
      drawHeat();
      drawn = performance.now();
    },
    end() {
      for (const strip of Object.values(strips)) strip.flush();
    },
  };
}

function steering() {
  const few = Number($("few").value);
  return {
    ...(state.muted.length ? { mute_experts: state.muted } : {}),
    ...(few ? { experts_per_token: few } : {}),
  };
}

function describe() {
  const { mute_experts: muted, experts_per_token: few } = steering();
  const without = muted?.map(([layer, expert]) => `${layer}/${expert}`).join(", ");
  return [state.model, without && `without ${without}`, few && `${few} experts a token`].filter(Boolean).join(", ");
}

function settings() {
  return {
    model: state.model, max_tokens: Number($("most").value), temperature: Number($("temperature").value), ...steering(),
  };
}

function busy(works) {
  for (const id of ["send", "compare-send"]) $(id).disabled = works;
  $("again").disabled = works || !state.answers.length;
  $("stop").disabled = !works;
}

// One answer to the messages so far; null where there is none.
async function answered(messages) {
  const told = listener();
  const began = performance.now();
  state.stop = new AbortController();
  busy(true);
  const [asked, answer] = [settings(), nothing()];
  try {
    await generate({ ...asked, messages }, told, { answer, signal: state.stop.signal });
    tell("status", `${answer.tokens.length} tokens in ${((performance.now() - began) / 1000).toFixed(1)} s`);
  } catch (error) {
    tell("status", error.name === "AbortError" ? "stopped" : error);
    if (error.name !== "AbortError" || !answer.tokens.length) return null;
  } finally {
    told.end();
    drawHeat();
    if (answer.tokens.length) state.answers.push({ asked, messages, ...answer });
    busy(false);
  }
  return answer;
}

async function send(text) {
  turn("you").textContent = text;
  const messages = [...state.messages, { role: "user", content: text }];
  const answer = await answered(messages);
  if (answer) state.messages = [...messages, { role: "assistant", content: answer.text }];
}

// The last question once more, with what is muted now; the conversation goes on from its first answer.
async function again() {
  const before = state.answers.at(-1);
  const answer = await answered(state.messages.slice(0, -1));
  if (!answer) return;
  const differs = answer.tokens.findIndex((one, place) => one.text !== before.tokens[place]?.text);
  for (const one of differs < 0 ? [] : answer.tokens.slice(differs)) chipOf(one)?.classList.add("other");
  const told = differs < 0 ? "the same tokens as before" : `other than before from token ${differs + 1} on`;
  tell("status", `${$("status").textContent}: ${told}`);
}

export function mute(layer, expert) {
  if (state.muted.some(([l, e]) => l === layer && e === expert)) return;
  state.muted.push([layer, expert]);
  drawMuted();
}

function drawMuted() {
  $("muted").hidden = !state.muted.length;
  $("muted").replaceChildren("Muted:", ...state.muted.map(([layer, expert], place) => element("button", {
    type: "button", ariaLabel: `use expert ${expert} of layer ${layer} again`,
    onclick: () => {
      state.muted.splice(place, 1);
      drawMuted();
    },
  }, `layer ${layer}, expert ${expert} \u00d7`)));
}

function clear() {
  Object.assign(state, { messages: [], answers: [], counts: new Counts() });
  $("talk").replaceChildren();
  $("token").replaceChildren();
  busy(false);
  drawHeat();
}

async function measureDomains() {
  $("measure").disabled = true;
  tell("status", "measuring: one short text of each domain");
  try {
    await measure(state.served);
    $("legend").replaceChildren(...DOMAINS.flatMap((name, place) => {
      const swatch = element("span", { className: "swatch" }, name);
      swatch.style.background = `hsl(${domainHue(place)} 70% 50% / .35)`;
      return [swatch, " "];
    }));
    $("colour").value = view.colour = "domain";
    repaint();
    tell("status", "measured");
  } catch (error) {
    tell("status", error);
  } finally {
    $("measure").disabled = false;
  }
}

export function startChat(model) {
  Object.assign(state, { model: model.name, served: model });
}

export const asked = () => settings();

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (!text || $("send").disabled) return;
  $("text").value = "";
  send(text);
});
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
});
walkable($("chat"), (chip) => show(chip, mute));
$("again").addEventListener("click", again);
$("stop").addEventListener("click", () => state.stop?.abort());
$("clear").addEventListener("click", clear);
$("measure").addEventListener("click", measureDomains);
$("save").addEventListener("click", () => download("conversation.json", {
  model: state.model, layers: view.layers, messages: state.messages, answers: state.answers,
}));
$("colour").addEventListener("change", () => {
  view.colour = $("colour").value;
  repaint();
});
$("layer").addEventListener("input", () => {
  view.layer = Number($("layer").value);
  nameLayer();
  repaint();
});
