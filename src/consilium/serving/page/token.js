"use strict";
// One token in full: what else might have come, and the experts of each layer.

import { promptOf, score } from "./api.js";
import { paint, tokenOf, view } from "./chips.js";
import { affinity, DOMAINS, measured } from "./domains.js";
import { $, element, table } from "./dom.js";

const probability = (logprob) => Math.exp(logprob).toFixed(3);

function likeliest(token) {
  const rows = token.top.map((one) => [JSON.stringify(one.token), probability(one.logprob)]);
  return table(["likeliest here", "probability"], rows, true);
}

function expertCell(token, row, layer, mute) {
  return token.experts[row].flatMap((expert, k) => (expert < 0 ? [] : [element(
    "span",
    { className: "expert" },
    `${expert} (${token.weights[row][k].toFixed(2)})`,
    element("button", {
      type: "button", className: "small", ariaLabel: `mute expert ${expert} of layer ${layer}`,
      onclick: () => mute(layer, expert),
    }, "mute"),
  ), " "]));
}

function routes(token, mute) {
  const rows = token.experts.map((_, row) => [
    view.layers[row],
    expertCell(token, row, view.layers[row], mute),
    token.runners?.[row] >= 0 ? String(token.runners[row]) : "-",
    token.margins ? token.margins[row].toFixed(3) : "-",
  ]);
  return table(["layer", "experts (weight)", "runner-up", "margin"], rows);
}

function unknown(token) {
  if (!view.layers.length) return "This model has no experts.";
  return token.prompt ? "The server did not tell." : "Not computed yet: nothing followed it.";
}

// Shows a token of a prompt again, with what might have come in its place.
async function complete(chip, prompt, mute) {
  try {
    await score(prompt);
  } catch (error) {
    $("token").append(element("p", {}, error.message));
    return;
  }
  paint(prompt.tokens);
  if (chip.getAttribute("aria-pressed")) show(chip, mute);
}

export function show(chip, mute) {
  for (const other of document.querySelectorAll('.chip[aria-pressed="true"]')) other.removeAttribute("aria-pressed");
  chip.setAttribute("aria-pressed", "true");
  const token = tokenOf(chip);
  const parts = [[
    JSON.stringify(token.text), token.prompt && "of the prompt",
    token.logprob !== null && `probability ${probability(token.logprob)}`,
  ].filter(Boolean).join(", ")];
  const domain = measured() ? affinity(token, view.layer) : null;
  if (domain !== null) parts.push(`layer ${view.layers[view.layer]}: nearest to ${DOMAINS[domain]}`);
  $("token").replaceChildren(element("p", {}, parts.join("; ")));
  if (token.top.length) $("token").append(likeliest(token));
  $("token").append(token.experts ? element("div", { className: "routes", tabIndex: 0, role: "group", ariaLabel: "Experts of each layer" }, routes(token, mute)) : element("p", {}, unknown(token)));
  const prompt = promptOf(token);
  if (prompt && !prompt.scored) complete(chip, prompt, mute);
}
