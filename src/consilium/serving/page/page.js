"use strict";
// One conversation with the model that this server serves, and which experts computed it. Nothing is asked of
// any other server. Tokens: {text, logprob, top, experts, weights}, the last two [layers][choices] or null.

const $ = (id) => document.getElementById(id);
const state = { model: null, messages: [], layers: [], counts: [], tokens: 0, answers: [], stop: null };

const headers = () => {
  const key = sessionStorage.getItem("key");
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
};

async function ask(path, options = {}) {
  const answer = await fetch(path, { headers: headers(), ...options });
  if (answer.status === 401) {
    $("key-label").hidden = false;
    throw new Error("this server needs a key");
  }
  if (!answer.ok) {
    const told = await answer.json().catch(() => null);
    throw new Error(told?.error?.message ?? `the server answered ${answer.status}`);
  }
  return answer;
}

async function start() {
  try {
    const models = await (await ask("v1/models")).json();
    state.model = models.data[0].id;
    $("model").textContent = `${state.model}, up to ${models.data[0].max_model_len.toLocaleString()} tokens`;
    $("key-label").hidden = true;
  } catch (error) {
    tell(error);
  }
}

function tell(error) {
  $("status").textContent = error.message ?? String(error);
  $("status").className = error instanceof Error ? "error" : "";
}

// Server-sent events of one answer, as objects.
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ") || part === "data: [DONE]") continue;
      const found = JSON.parse(part.slice(6));
      if (found.error) throw new Error(found.error.message);
      yield found;
    }
  }
}

function turn(role) {
  const box = document.createElement("div");
  box.className = "turn";
  const title = document.createElement("h4");
  title.textContent = role;
  const text = document.createElement("div");
  text.className = "text";
  box.append(title, text);
  $("talk").append(box);
  return text;
}

// A colour for a number of a few, far from its neighbours' colours.
const hue = (number) => (number * 137.508) % 360;

function colour(token) {
  const kind = $("colour").value;
  if (kind === "confidence" && token.logprob !== null) {
    return `hsl(${120 * Math.exp(token.logprob)} 70% 50% / .35)`;
  }
  const expert = token.experts?.[Number($("layer").value)]?.[0];
  return kind === "expert" && expert !== undefined && expert >= 0 ? `hsl(${hue(expert)} 70% 50% / .35)` : "";
}

function chip(token, into) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "chip";
  button.textContent = token.text;
  button.title = "which experts computed this token";
  button.token = token;
  button.style.background = colour(token);
  into.append(button);
  return button;
}

function repaint() {
  for (const button of document.querySelectorAll(".chip")) button.style.background = colour(button.token);
  $("layer-name").textContent = state.layers[Number($("layer").value)] ?? "-";
}

function learnLayers(layers) {
  if (state.layers.length || !layers?.length) return;
  state.layers = layers;
  state.counts = layers.map(() => []);
  $("layer").max = layers.length - 1;
  repaint();
}

function count(experts) {
  state.tokens += 1;
  experts.forEach((chosen, layer) => {
    for (const expert of chosen) {
      if (expert >= 0) state.counts[layer][expert] = (state.counts[layer][expert] ?? 0) + 1;
    }
  });
}

// Layers from top to bottom, experts from left to right; grey is a fair share, red more, blue less.
function drawHeat() {
  const wide = Math.max(0, ...state.counts.map((row) => row.length));
  if (!wide) return;
  const canvas = $("heat");
  const high = Math.max(8, Math.min(24, Math.floor(320 / state.layers.length)));
  canvas.width = Math.max(wide, 320);
  canvas.height = high * state.layers.length;
  const paint = canvas.getContext("2d");
  state.counts.forEach((row, layer) => {
    const fair = row.reduce((sum, value) => sum + (value ?? 0), 0) / wide;
    for (let expert = 0; expert < wide; expert += 1) {
      const share = fair ? (row[expert] ?? 0) / fair : 0;
      const strength = Math.min(Math.abs(share - 1), 1) * 75;
      paint.fillStyle = `hsl(${share > 1 ? 8 : 215} ${strength}% ${share > 1 ? 55 : 50}%)`;
      const left = Math.floor((expert * canvas.width) / wide);
      paint.fillRect(left, layer * high, Math.ceil(canvas.width / wide), high - 1);
    }
  });
  $("heat-note").textContent = `${state.tokens.toLocaleString()} tokens, ${state.layers.length} layers, ${wide} experts: `
    + "grey is a fair share, red more, blue less.";
}

function cells(row, kind, values) {
  for (const value of values) {
    const cell = document.createElement(kind);
    cell.textContent = value;
    row.append(cell);
  }
  return row;
}

function table(head, rows) {
  const made = document.createElement("table");
  made.append(cells(document.createElement("tr"), "th", head));
  for (const values of rows) made.append(cells(document.createElement("tr"), "td", values));
  return made;
}

function show(button) {
  for (const other of document.querySelectorAll('.chip[aria-pressed="true"]')) other.removeAttribute("aria-pressed");
  button.setAttribute("aria-pressed", "true");
  const token = button.token;
  const panel = $("token");
  panel.replaceChildren();
  const title = document.createElement("p");
  title.textContent = `${JSON.stringify(token.text)}${token.logprob === null ? "" : `, probability ${Math.exp(token.logprob).toFixed(3)}`}`;
  panel.append(title);
  if (token.top?.length) {
    panel.append(table(["likeliest here", "probability"], token.top.map((one) => [JSON.stringify(one.token), Math.exp(one.logprob).toFixed(3)])));
  }
  if (token.experts) {
    const rows = token.experts.map((chosen, layer) => [
      state.layers[layer],
      chosen.filter((expert) => expert >= 0).map((expert, k) => `${expert} (${token.weights[layer][k].toFixed(2)})`).join("  "),
    ]);
    panel.append(table(["layer", "experts (weight)"], rows));
  } else {
    const none = document.createElement("p");
    none.textContent = state.layers.length ? "Not computed yet: nothing followed it." : "This model has no experts.";
    panel.append(none);
  }
}

async function send(text) {
  state.messages.push({ role: "user", content: text });
  turn("you").textContent = text;
  const into = turn(state.model);
  const answer = { tokens: [], text: "", decoder: new TextDecoder() };
  state.answers.push(answer);
  state.stop = new AbortController();
  $("send").disabled = true;
  $("stop").disabled = false;
  const began = performance.now();
  try {
    const body = {
      model: state.model, messages: state.messages, stream: true, logprobs: true, top_logprobs: 5,
      return_routed_experts: true, max_tokens: Number($("most").value), temperature: Number($("temperature").value),
    };
    const found = await ask("v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal: state.stop.signal });
    for await (const event of events(found)) take(event.choices[0], answer, into);
    tell(`${answer.tokens.length} tokens in ${((performance.now() - began) / 1000).toFixed(1)} s`);
  } catch (error) {
    tell(error.name === "AbortError" ? "stopped" : error);
  } finally {
    state.messages.push({ role: "assistant", content: answer.text });
    $("send").disabled = false;
    $("stop").disabled = true;
    drawHeat();
  }
}

// The text of a token, of which a character of several tokens is shown with the last of them.
function shown(answer, one) {
  if (!one.bytes?.length) return one.token;
  return answer.decoder.decode(new Uint8Array(one.bytes), { stream: true }) || "\u00b7";
}

// One event: its tokens, and the experts of tokens that were computed meanwhile, which lag by one.
function take(choice, answer, into) {
  if (!choice) return;
  answer.text += choice.delta?.content ?? "";
  learnLayers(choice.routed_layers);
  choice.prompt_routed_experts?.forEach(count);
  choice.routed_experts?.forEach((experts, i) => {
    const token = answer.tokens.find((one) => one.experts === null);
    if (!token) return;
    token.experts = experts;
    token.weights = choice.routed_weights[i];
    token.button.style.background = colour(token);
    count(experts);
  });
  for (const one of choice.logprobs?.content ?? []) {
    const token = { text: shown(answer, one), logprob: one.logprob, top: one.top_logprobs, experts: null, weights: null };
    token.button = chip(token, into);
    answer.tokens.push(token);
  }
  if (answer.tokens.length % 16 === 0) drawHeat();
  $("talk").scrollTop = $("talk").scrollHeight;
}

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
$("talk").addEventListener("click", (event) => { if (event.target.token) show(event.target); });
$("stop").addEventListener("click", () => state.stop?.abort());
$("clear").addEventListener("click", () => {
  Object.assign(state, { messages: [], answers: [], tokens: 0, counts: state.layers.map(() => []) });
  $("talk").replaceChildren();
  $("token").replaceChildren();
});
$("save").addEventListener("click", () => {
  const answers = state.answers.map(({ text, tokens }) => ({ text, tokens: tokens.map(({ button, ...rest }) => rest) }));
  const data = JSON.stringify({ model: state.model, layers: state.layers, messages: state.messages, answers }, null, 1);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([data], { type: "application/json" }));
  link.download = "conversation.json";
  link.click();
  URL.revokeObjectURL(link.href);
});
$("colour").addEventListener("change", repaint);
$("layer").addEventListener("input", repaint);
$("key").addEventListener("change", () => {
  sessionStorage.setItem("key", $("key").value);
  start();
});
start();
