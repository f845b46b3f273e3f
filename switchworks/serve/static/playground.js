// The page at /: fills holes, colours tokens by expert, asks for the router's probabilities.
// Texts of models are put in by textContent alone: they may hold anything.

const EXAMPLES = {
  false: "The <extra_id_0> of the list is <extra_id_1>.",
  true: "The list of",
};
const HOLE = /<extra_id_(\d+)>/g;
const byId = (id) => document.getElementById(id);
const text = byId("text");
const cards = new Map(); // of /v1/models, by name
const counts = new Map(); // tokens, by model, layer and expert
let abort = null;

class Refusal extends Error {
  constructor(status, message, retry) {
    super(message);
    this.status = status;
    this.retry = retry;
  }
}

async function call(path, body, signal) {
  const key = sessionStorage.getItem("key");
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  const method = body === undefined ? "GET" : "POST";
  const response = await fetch(path, { method, headers, signal, body: JSON.stringify(body) });
  if (!response.ok) {
    const told = await response.json().catch(() => null);
    const message = told?.error?.message ?? `${response.status} ${response.statusText}`;
    throw new Refusal(response.status, message, response.headers.get("Retry-After"));
  }
  return response;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (part !== "data: [DONE]") yield JSON.parse(part.slice("data: ".length));
    }
  }
}

function show(element, is) {
  element.hidden = !is;
}

function element(name, content, ...classes) {
  const made = document.createElement(name);
  if (content !== undefined) made.textContent = content;
  made.classList.add(...classes);
  return made;
}

function fail(error) {
  if (error.name === "AbortError") return;
  if (error.status === 401) {
    show(byId("key"), true);
    byId("secret").focus();
    return;
  }
  const wait = error.retry ? `\nTry again in ${error.retry} seconds.` : "";
  byId("error").textContent = error.message + wait;
  show(byId("error"), true);
}

// The models, and the form.

async function loadModels() {
  try {
    const { data } = await (await call("/v1/models")).json();
    show(byId("key"), false);
    cards.clear();
    byId("model").replaceChildren();
    for (const card of data) {
      cards.set(card.id, card);
      byId("model").append(new Option(card.id));
      if (data.length > 1) byId("other").append(new Option(card.id));
    }
    show(byId("other").parentElement, data.length > 1);
    chooseModel();
    poll();
  } catch (error) {
    fail(error);
  }
}

function chooseModel() {
  const card = cards.get(byId("model").value);
  byId("length").max = card.max_length;
  show(byId("hole"), !card.decoder_only);
  const untouched = !text.value || Object.values(EXAMPLES).includes(text.value);
  if (untouched) text.value = EXAMPLES[card.decoder_only];
  byId("lead").textContent =
    (card.decoder_only
      ? "Write the beginning of a text, and the model continues it. "
      : "Write a text with holes, and the model fills them. ") +
    "Each token has the colour of the expert that read or wrote it; select one to see how sure " +
    "the router was.";
}

function insertHole() {
  const numbers = [...text.value.matchAll(HOLE)].map((match) => Number(match[1]) + 1);
  text.setRangeText(`<extra_id_${Math.max(0, ...numbers)}>`, text.selectionStart, text.selectionEnd, "end");
  text.focus();
}

// One answer of one model.

class Answer {
  constructor(card, prompt) {
    this.card = card;
    this.prompt = prompt;
    this.input = [];
    this.output = [];
    this.root = byId("answer").content.firstElementChild.cloneNode(true);
    this.part = (selector) => this.root.querySelector(selector);
    this.part("h2").textContent = card.id;
    this.part(".result").textContent = "…";
    const layers = Object.keys(card.layers);
    const reads = (name) => card.decoder_only || name.startsWith("encoder");
    const writes = (name) => name.startsWith("decoder");
    for (const [side, takes] of [["input", reads], ["output", writes]]) {
      const select = this.part(`.${side} select`);
      for (const name of layers.filter(takes)) select.append(new Option(name));
      select.selectedIndex = select.length - 1;
      select.addEventListener("change", () => this.draw(side));
      show(select.parentElement, select.length > 0);
    }
  }

  async run(settings, signal) {
    const body = { ...settings, model: this.card.id, text: this.prompt, experts: true };
    const start = performance.now();
    const response = await call("/v1/generate", body, signal);
    if (!body.stream) {
      this.finish(await response.json());
      return;
    }
    let first = null;
    for await (const event of events(response)) {
      first ??= event.token && performance.now();
      if (event.choices) this.finish(event);
      else if (event.token) this.write(event, performance.now() - start, first - start);
      else this.input = event.input;
    }
  }

  write(event, time, first) {
    this.output.push(event.token);
    this.fills = event.fills;
    this.compose(event.text, event.fills);
    this.append(event.token, this.output.length - 1);
    this.tellSpeed(this.output.length, time / 1000, first / 1000);
  }

  finish(answer) {
    const [best, ...others] = answer.choices;
    this.input = answer.input;
    this.output = best.tokens;
    this.compose(best.text, best.fills);
    this.draw("input");
    this.draw("output");
    const { completion_tokens, seconds, first_token_seconds } = answer.usage;
    this.tellSpeed(completion_tokens, seconds, first_token_seconds);
    this.tellOthers(answer.choices, others.length > 0);
    this.count();
    byId("live").textContent = `${this.card.id}: ${best.text}`;
  }

  tellSpeed(tokens, seconds, first) {
    const rate = (tokens / Math.max(seconds, 1e-3)).toFixed(0);
    const wait = first === undefined ? "" : `, the first after ${(1000 * first).toFixed(0)} ms`;
    this.part(".speed").textContent = `${tokens} tokens, ${rate} a second${wait}`;
  }

  // The text as it was given, with what was written in its place.
  compose(whole, fills) {
    const result = this.part(".result");
    result.replaceChildren();
    if (this.card.decoder_only) {
      const is_prefix = whole.startsWith(this.prompt.trimEnd());
      const end = is_prefix ? this.prompt.trimEnd().length : 0;
      result.append(whole.slice(0, end), element("mark", whole.slice(end)));
      return;
    }
    const given = this.prompt.search(HOLE) < 0 ? `${this.prompt.trimEnd()} <extra_id_0>` : this.prompt;
    let end = 0;
    for (const match of given.matchAll(HOLE)) {
      result.append(given.slice(end, match.index), element("mark", fills[match[1]] || "…"));
      end = match.index + match[0].length;
    }
    result.append(given.slice(end));
  }

  draw(side) {
    show(this.part(`.${side}`), true);
    this.part(`.${side} .tokens`).replaceChildren();
    this[side].forEach((token, place) => this.append(token, place, side));
  }

  append(token, place, side = "output") {
    show(this.part(`.${side}`), true);
    const layer = this.part(`.${side} select`).value;
    const experts = token.experts?.[layer] ?? [];
    const button = element("button", undefined, "token");
    button.type = "button";
    const shown = token.text.replaceAll("\n", "⏎").trim() || token.text || "·";
    button.append(shown);
    const told = experts.length ? `expert ${experts.join(" and ")} of ${layer}` : "no expert";
    button.setAttribute("aria-label", `${shown}, ${told}`);
    button.title = told;
    button.setAttribute("aria-pressed", "false");
    if (layer) button.append(element("small", experts.join("+") || "–"));
    if (experts.length) button.style.setProperty("--hue", hue(experts[0]));
    else button.classList.add("none");
    button.addEventListener("click", () => this.explain(button, side, place).catch(fail));
    this.part(`.${side} .tokens`).append(button);
  }

  async explain(button, side, place) {
    for (const other of this.root.querySelectorAll(".token")) other.setAttribute("aria-pressed", "false");
    button.setAttribute("aria-pressed", "true");
    const output = this.output.map((token) => token.id);
    const body = { model: this.card.id, text: this.prompt, output };
    this.routing ??= (await call("/v1/routing", body)).json();
    const { layers } = await this.routing;
    const token = this[side][place];
    const panel = this.part(".router");
    show(panel, true);
    panel.replaceChildren(element("h3", `The routers at “${token.text.trim() || token.text}”`));
    if (token.log_prob !== undefined) {
      const chance = (100 * Math.exp(token.log_prob)).toFixed(1);
      panel.append(element("p", `The model wrote it with a probability of ${chance} %.`, "soft"));
    }
    const tables = element("div", undefined, "layers");
    const stack = side === "input" && !this.card.decoder_only ? "encoder" : "decoder";
    const offset = side === "output" && this.card.decoder_only ? this.input.length : 0;
    for (const [name, rows] of Object.entries(layers)) {
      if (name.startsWith(stack)) tables.append(bars(name, rows[place + offset]));
    }
    panel.append(tables);
  }

  tellOthers(choices, is) {
    show(this.part(".others"), is);
    const list = this.part(".others ol");
    list.replaceChildren();
    for (const choice of is ? choices : []) {
      const fills = Object.entries(choice.fills).map(([hole, fill]) => `${hole}: ${fill}`);
      const said = fills.length ? fills.join("   ") : choice.text;
      list.append(element("li", `${said}   (ln p ${choice.score.toFixed(2)})`));
    }
  }

  count() {
    const model = counts.get(this.card.id) ?? new Map();
    counts.set(this.card.id, model);
    for (const token of [...this.input, ...this.output]) {
      for (const [layer, experts] of Object.entries(token.experts ?? {})) {
        if (!model.has(layer)) model.set(layer, new Array(this.card.layers[layer]).fill(0));
        for (const expert of experts) model.get(layer)[expert] += 1;
      }
    }
    drawHeat();
  }
}

// Neighbours in number are far apart in colour: the golden angle.
function hue(expert) {
  return Math.round((expert * 137.508 + 200) % 360);
}

function bars(name, row) {
  const box = element("div");
  box.append(element("h3", name));
  const table = element("table");
  for (const [expert, probability] of row ?? []) {
    const line = table.insertRow();
    line.insertCell().textContent = `expert ${expert}`;
    const meter = element("meter");
    meter.value = probability;
    meter.setAttribute("aria-label", `expert ${expert}`);
    line.insertCell().append(meter);
    line.insertCell().textContent = `${(100 * probability).toFixed(1)} %`;
  }
  box.append(table);
  return box;
}

function drawHeat() {
  byId("maps").replaceChildren();
  for (const [model, layers] of counts) {
    const scroll = element("div", undefined, "scroll");
    scroll.tabIndex = 0;
    const table = element("table");
    table.createCaption().textContent = counts.size > 1 ? model : "";
    const head = table.createTHead().insertRow();
    const widest = Math.max(...[...layers.values()].map((load) => load.length));
    head.append(element("th", "expert"));
    for (let expert = 0; expert < widest; expert++) head.append(element("th", expert));
    const body = table.createTBody();
    for (const [layer, load] of layers) {
      const most = Math.max(...load, 1);
      const row = body.insertRow();
      row.append(element("th", layer));
      load.forEach((count, expert) => {
        const cell = row.insertCell();
        cell.textContent = count;
        cell.title = `expert ${expert} of ${layer}: ${count} tokens`;
        cell.style.setProperty("--share", `${(100 * count) / most}%`);
        cell.classList.toggle("full", count / most > 0.6);
      });
    }
    scroll.append(table);
    byId("maps").append(scroll);
  }
  show(byId("heat"), counts.size > 0);
}

async function run(submitted) {
  submitted?.preventDefault();
  abort?.abort();
  abort = new AbortController();
  const { signal } = abort;
  const number = Math.max(1, byId("alternatives").valueAsNumber || 1);
  const temperature = byId("temperature").valueAsNumber || 0;
  const settings = { max_length: byId("length").valueAsNumber || 48, temperature, stream: number === 1 };
  if (number > 1) settings.candidates = number;
  if (number > 1 && !temperature) settings.beams = Math.max(4, number);
  if (temperature) settings.seed = Math.floor(Math.random() * 2 ** 31);
  const names = [...new Set([byId("model").value, byId("other").value].filter(Boolean))];
  const answers = names.map((name) => new Answer(cards.get(name), text.value));
  byId("answers").replaceChildren(...answers.map((answer) => answer.root));
  show(byId("error"), false);
  byId("stop").disabled = false;
  await Promise.all(answers.map((answer) => answer.run(settings, signal).catch(fail)));
  byId("stop").disabled = abort.signal === signal || byId("stop").disabled;
}

// What the server is doing.

async function poll() {
  if (document.hidden) return;
  try {
    const { models, resident_bytes } = await (await call("/v1/status")).json();
    const rates = Object.values(models).map((model) => model.tokens_per_second);
    const parts = [`${Math.max(...rates).toFixed(0)} tokens/s`, `${(resident_bytes / 1e6).toFixed(0)} MB`];
    const cached = Object.values(models).map((model) => model.expert_cache).filter(Boolean);
    for (const { hits, misses } of cached) {
      parts.push(`${((100 * hits) / Math.max(1, hits + misses)).toFixed(0)} % of experts in memory`);
    }
    byId("numbers").textContent = parts.join(" · ");
  } catch {
    byId("numbers").textContent = "the server does not answer";
  }
}

byId("form").addEventListener("submit", run);
byId("stop").addEventListener("click", () => {
  abort?.abort();
  byId("stop").disabled = true;
});
byId("hole").addEventListener("click", insertHole);
byId("model").addEventListener("change", chooseModel);
byId("reset").addEventListener("click", () => {
  counts.clear();
  drawHeat();
});
byId("key").addEventListener("submit", (submitted) => {
  submitted.preventDefault();
  sessionStorage.setItem("key", byId("secret").value);
  loadModels();
});
text.addEventListener("keydown", (pressed) => {
  if (pressed.key === "Enter" && (pressed.ctrlKey || pressed.metaKey)) byId("form").requestSubmit();
});
setInterval(poll, 2000);
loadModels();
