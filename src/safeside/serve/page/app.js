// The page: what is asked, and what comes back for base and safe answers.

import { strip, trace, verdicts } from "./charts.js";
import { get, stream } from "./client.js";

const at = (id) => document.getElementById(id);
const NAMES = { allow: "\u2713 allowed", annotate: "\u25b3 annotated", steer: "\u21bb steered", replace: "\u21c4 replaced", block: "\u2716 blocked" };
const BASE = { strength: 0, mode: "shadow" };
const NEEDS_KEY = "The base's own answer needs a key that may loosen: safeside key FILE NAME --tenant TENANT --may-loosen";
const state = { model: "", history: [], turn: null, running: null };

const key = () => at("key").value.trim();

async function connect() {
  try {
    const [models, policies] = await Promise.all([get("/v1/models", key()), get("/v1/policies", key())]);
    state.model = models.data[0].id;
    at("served").textContent = `${state.model} \u00b7 policies ${policies.version}`;
    const [first] = at("policy").options;
    at("policy").replaceChildren(first, ...policies.data.map((policy) => new Option(policy.id, policy.id)));
    const holding = policies.data.filter((policy) => policy.holds).map((policy) => policy.id);
    at("holding").textContent = `Holds for you: ${holding.join(" + ")}`;
    at("send").disabled = false;
  } catch (error) {
    at("served").textContent = error.message;
    at("send").disabled = true;
  }
}

function wanted() {
  const safety = { tokens: true };
  if (at("policy").value) safety.policy = at("policy").value;
  if (at("mode").value) safety.mode = at("mode").value;
  if (at("set-strength").checked) safety.strength = Number(at("strength").value);
  return safety;
}

function badge(section, text, kind) {
  const place = section.querySelector(".badge");
  place.textContent = text;
  place.className = `badge ${kind}`;
}

// Fills one section with an answer; gives its text, tokens and safety object.
async function answer(section, messages, safety, signal, shown) {
  const found = { text: "", tokens: [], safety: null, finish: null };
  const place = section.querySelector(".text");
  place.textContent = "";
  place.classList.remove("failed", "quiet");
  section.setAttribute("aria-busy", "true");
  badge(section, "\u2026", "waiting");
  try {
    const body = { model: state.model, messages, safety, max_tokens: Number(at("tokens").value), temperature: 0 };
    await stream(body, key(), signal, (chunk) => {
      const choice = chunk.choices[0];
      found.text += choice?.delta.content ?? "";
      found.tokens.push(...(chunk.safety?.tokens ?? []));
      if (choice?.finish_reason) [found.finish, found.safety] = [choice.finish_reason, chunk.safety];
      place.textContent = found.text;
      shown(found);
    });
    const isEmpty = !found.text.trim();
    if (isEmpty) place.textContent = found.finish === "content_filter" ? "(nothing was sent)" : "(an empty answer)";
    place.classList.toggle("quiet", isEmpty);
    return found;
  } catch (error) {
    if (error.name === "AbortError") return null;
    const isBarred = error.status === 403 && safety === BASE;
    place.textContent = isBarred ? NEEDS_KEY : error.message;
    place.classList.add(isBarred ? "quiet" : "failed");
    badge(section, isBarred ? "not shown" : "\u26a0 no answer", isBarred ? "plain" : "failed");
    return null;
  } finally {
    section.removeAttribute("aria-busy");
  }
}

function linesOf(safety) {
  const lines = {};
  for (const verdict of safety?.verdicts ?? []) {
    if (verdict.stage === "answer") lines[verdict.guard] = Math.min(lines[verdict.guard] ?? 1, verdict.threshold);
  }
  return lines;
}

function show(card, found) {
  const charts = card.querySelector(".charts");
  charts.hidden = false;
  const lines = linesOf(found.safety);
  strip(card.querySelector(".strip"), found.tokens, lines);
  card.querySelector(".legend").textContent = found.tokens.length
    ? "The bar is the risk from 0 to 1; \u25b2 and a line mark what reaches the answer's threshold. Point at a token for its figures."
    : "No token was sent.";
  trace(card.querySelector(".trace"), found.tokens);
  card.querySelector(".strength-title").hidden = !found.tokens.length;
  if (found.safety) verdicts(card.querySelector(".verdicts"), found.safety.verdicts);
}

function conclude(card, section, found) {
  const { action, intended, reason, policy, strength } = found.safety;
  const kind = found.finish === "content_filter" && action === "block" ? "block" : action;
  badge(section, NAMES[kind], kind);
  const why = [`policy ${policy}`, `strength up to ${strength.toFixed(2)}`];
  if (reason && !reason.startsWith("strength")) why.push(reason);
  if (intended !== action) why.push(`enforced it would be: ${intended}`);
  card.querySelector(".reason").textContent = why.join(" \u00b7 ");
}

async function ask(card, prompt) {
  state.running?.abort();
  const control = (state.running = new AbortController());
  card.classList.remove("done");
  const messages = [...state.history, { role: "user", content: prompt }];
  const [base, safe] = [card.querySelector(".base"), card.querySelector(".safe")];
  base.hidden = !at("compare").checked;
  const others = base.hidden ? null : answer(base, messages, BASE, control.signal, () => {});
  const found = await answer(safe, messages, wanted(), control.signal, (part) => show(card, part));
  if (found) {
    show(card, found);
    conclude(card, safe, found);
  }
  const plain = await others;
  if (plain) badge(base, plain.finish === "length" ? "cut at its length" : "as it is", "plain");
  if (state.running === control) {
    state.running = null;
    card.classList.add("done");
  }
  return found;
}

async function send(prompt) {
  at("empty")?.remove();
  if (state.turn?.found?.text) {
    state.history.push({ role: "user", content: state.turn.prompt }, { role: "assistant", content: state.turn.found.text });
  }
  const card = at("turn-template").content.firstElementChild.cloneNode(true);
  card.querySelector(".asked").textContent = prompt;
  at("turns").append(card);
  state.turn = { prompt, card, found: null };
  card.scrollIntoView({ block: "start" });
  state.turn.found = await ask(card, prompt);
}

// The last question again, with the settings as they are now.
async function again() {
  const turn = state.turn;
  if (turn) turn.found = (await ask(turn.card, turn.prompt)) ?? turn.found;
}

function showStrength() {
  const isSet = at("set-strength").checked;
  at("strength").disabled = !isSet;
  at("strength-value").textContent = isSet ? Number(at("strength").value).toFixed(2) : "policy";
}

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  at("theme").querySelector("span").textContent = name;
}

at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const prompt = at("prompt").value.trim();
  if (!prompt) return;
  at("prompt").value = "";
  send(prompt);
});
at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("composer").requestSubmit();
  }
});
at("clear").addEventListener("click", () => {
  state.running?.abort();
  [state.history, state.turn] = [[], null];
  at("turns").replaceChildren();
});
at("controls").addEventListener("submit", (event) => event.preventDefault());
at("strength").addEventListener("input", showStrength);
for (const id of ["strength", "set-strength", "policy", "mode", "tokens", "compare"]) {
  at(id).addEventListener("change", () => {
    showStrength();
    again();
  });
}
at("key").addEventListener("change", connect);
at("connection").addEventListener("submit", (event) => {
  event.preventDefault();
  connect();
});
at("theme").addEventListener("click", () => {
  const names = ["system", "dark", "light"];
  setTheme(names[(names.indexOf(document.documentElement.dataset.theme) + 1) % names.length]);
});
setTheme("system");
showStrength();
connect();
