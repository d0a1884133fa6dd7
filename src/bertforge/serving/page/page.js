// The page's only script. Texts are hostile: whatever comes from a person or from the server becomes text nodes, never
// markup. One question is under way at a time, and a new one calls the old one off. The API key lives in its input alone.

const SHOWN_LABELS = 5;
const SHOWN_PUSHES = 6; // words, or columns, for and against
const LEAST = 0.0005; // a push that rounds to no tenth of a point is none
const DECIDING = 0.02; // no word decides where none pushes more
const byId = (id) => document.getElementById(id);

let models = [];
let running = new AbortController();

/** An element with attributes and children; strings become text. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function show(id, text) {
  byId(id).textContent = text;
  byId(id).hidden = !text;
}

/** A probability for people; nothing is certain. */
function percent(share) {
  if (share > 0.999) return "over 99.9%";
  if (share < 0.001) return "under 0.1%";
  return `${(100 * share).toFixed(share < 0.1 || share > 0.99 ? 1 : 0)}%`;
}

const points = (push) => `${push < 0 ? "−" : "+"}${Math.abs(100 * push).toFixed(Math.abs(push) < 0.095 ? 1 : 0)} points`;
const model = () => models[Math.max(0, byId("model").selectedIndex)];

// The server

class Refusal extends Error {
  constructor(said, field) {
    super(said);
    this.field = field;
  }
}

/** What the server says to `body`, as JSON; throws a Refusal in words for people. */
async function ask(path, body) {
  const headers = body ? { "Content-Type": "application/json" } : {};
  const key = byId("key").value;
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, {
      method: body ? "POST" : "GET",
      headers,
      body: body && JSON.stringify(body),
      signal: running.signal,
    });
  } catch (problem) {
    if (problem.name === "AbortError") throw problem;
    throw new Refusal("The server does not answer. Is it still running? Try again in a moment.");
  }
  const found = await response.json().catch(() => ({}));
  if (response.ok) return found;
  if (response.status === 401) byId("key-box").open = true;
  throw new Refusal(inWords(response, found.error ?? {}), response.status === 401 ? "key" : found.error?.field);
}

function inWords(response, error) {
  const said = error.message ? ` The server says: ${error.message}` : "";
  const wait = response.headers.get("Retry-After");
  switch (response.status) {
    case 401: return byId("key").value
      ? "This server does not know this API key. Check it and type it again."
      : "This server needs an API key. Type it into the field “Key”.";
    case 404: return `This model is not served any more. Load the page again.${said}`;
    case 413: return `The text is longer than the server takes. Shorten it.${said}`;
    case 422: return `The server cannot read what was typed.${said}`;
    case 429: return `The server has too much to do. Try again in ${wait ?? "a few"} seconds.`;
    case 503: return "The model is starting again, or the server is closing down. Try again in a moment.";
    case 504: return "The answer took too long. Try again in a moment.";
    default: return `The server could not answer (${response.status}).${said}`;
  }
}

// The form

/** A long name such as PostCreationDate, that may be broken where a word of it begins. */
const breakable = (name) => name.split(/(?<=[a-z0-9])(?=[A-Z_.])/).flatMap((part) => [make("wbr"), part]);

function field(name, input) {
  input.dataset.column = name;
  input.id = `field-${name}`;
  return make("div", {}, make("label", { for: input.id }, ...breakable(name)), input);
}

/** Fields for the columns that the chosen model reads; what was typed stays where the new model reads it too. */
function drawFields() {
  const { text_columns: texts, columns, precision, max_length: longest, labels } = model();
  const typed = Object.fromEntries(inputs().map((input) => [input.dataset.column, input.value]));
  show(
    "about",
    `${model().name} (${precision}) reads up to ${longest} tokens and answers with one of ${labels.length} labels: ` +
    labels.slice(0, 8).join(", ") + (labels.length > 8 ? " …" : ""),
  );
  byId("texts").replaceChildren(
    ...texts.map((name, place) =>
      field(name, make("textarea", { rows: place === texts.length - 1 ? 8 : 2, required: "", "aria-describedby": "error" })),
    ),
  );
  byId("column-fields").replaceChildren(
    ...columns.map((name) => field(name, make("input", { autocomplete: "off", "aria-describedby": "error" }))),
  );
  byId("columns").hidden = columns.length === 0;
  for (const input of inputs()) input.value = typed[input.dataset.column] ?? "";
}

const inputs = () => [...document.querySelectorAll("[data-column]")];

function complain(problem) {
  for (const input of inputs()) input.removeAttribute("aria-invalid");
  show("error", problem?.message ?? "");
  if (!problem) return;
  byId("progress").textContent = "";
  const wrong = inputs().find((input) => problem.field?.endsWith(`.${input.dataset.column}`));
  wrong?.setAttribute("aria-invalid", "true");
  (problem.field === "key" ? byId("key") : wrong ?? byId("ask")).focus();
}

async function submit() {
  if (!models.length) { // the key was missing
    await start();
    inputs()[0]?.focus();
    return;
  }
  running.abort();
  running = new AbortController();
  const { signal } = running;
  byId("answer").hidden = true;
  complain(null);
  const row = Object.fromEntries(inputs().map((input) => [input.dataset.column, input.value]));
  const noText = new Refusal("There is no text yet. Type or paste one.", `.${model().text_columns[0]}`);
  if (model().text_columns.every((name) => !row[name].trim())) {
    complain(noText);
    return;
  }
  const progress = byId("progress");
  const question = { model: model().name };
  try {
    progress.textContent = "Asking the model …";
    const found = await ask("v1/classify", { ...question, inputs: [row] });
    if (found.results[0].label === null) throw noText; // what is white space, the server knows best
    drawVerdict(found);
    const isCut = found.results[0].tokens_cut > 0;
    progress.textContent = "Leaving out each word to see what it does …";
    drawReasons(row, await ask("v1/explain", { ...question, inputs: row }), isCut);
    progress.textContent = "What pushed the answer is shown below it.";
    drawMonitor();
  } catch (problem) {
    if (!signal.aborted) complain(problem);
    if (!(problem instanceof Refusal) && !signal.aborted) throw problem;
  }
}

// The answer

function drawVerdict({ id, model: served, results: [result] }) {
  const { label, probability, decision } = result;
  const sure = Math.round(100 * probability);
  byId("verdict").textContent = `${label}, ${percent(probability)}`;
  byId("meaning").textContent =
    sure === 100
      ? `Of 100 texts that get this number, nearly all are “${label}”.`
      : `Of 100 texts that get this number, about ${sure} are “${label}”.`;
  const ranked = Object.entries(result.probabilities).sort((one, other) => other[1] - one[1]);
  show("decision", decision === undefined ? "" : `Decision: ${decided(decision, label, ranked[0][0], served)}`);
  byId("labels").replaceChildren(
    ...ranked.slice(0, SHOWN_LABELS).map(([name, share]) => {
      const bar = make("i", { "aria-hidden": "true" });
      bar.style.setProperty("--share", `${100 * share}%`);
      return make("li", {}, make("span", {}, name), bar, make("b", {}, percent(share)));
    }),
  );
  const remarks = [];
  if (ranked.length > SHOWN_LABELS) remarks.push(`${ranked.length - SHOWN_LABELS} more labels are less likely.`);
  if (result.tokens_cut > 0) {
    remarks.push(`The model read the first ${result.tokens} tokens. ${result.tokens_cut} at the end were not read.`);
  }
  if (result.problem) remarks.push(`Beware: ${result.problem}.`);
  show("remark", remarks.join(" "));
  byId("origin").textContent = `Model ${served.name} (${served.precision}). Request ${id}. Digest of the model: ${served.id}`;
  byId("why").hidden = byId("mistakes").hidden = true;
  byId("answer").hidden = false;
  byId("verdict").focus();
}

/** The decision, and why it is not the likeliest label; `name` is that label's among the thresholds. */
function decided(decision, label, name, served) {
  if (decision === label) return `${label}`;
  const least = model().id === served.id ? model().thresholds[name] : undefined; // swapped since the page was loaded
  const counts = least > 1 ? "never counts" : least ? `counts from ${Number((100 * least).toFixed(1))}%` : "does not count";
  const said = decision === "abstain" ? "send to a person" : decision;
  return `${said}. By your thresholds, “${label}” ${counts}.`;
}

function drawReasons(row, found, isCut) {
  const { words, columns, label, probability } = found;
  const cut = (word) => [...row[word.field]].slice(word.start, word.end).join("");
  const pushes = [
    ...words.map((word) => ({ name: [`“${shorten(cut(word))}”`], push: word.push })),
    ...columns.map(({ name, value, push }) => ({ name: [...breakable(name), `: ${shorten(value)}`], push })),
  ].filter(({ push }) => Math.abs(push) >= LEAST);
  const most = Math.max(...pushes.map(({ push }) => Math.abs(push)), LEAST);
  byId("why-method").textContent =
    `The model was asked again without each word${columns.length ? " and each column" : ""}. ` +
    `The number tells how far that lowers or raises the ${percent(probability)} of “${label}”.` +
    (most < DECIDING ? " Leave out any one word and the answer stays." : "") +
    (found.note ? ` Note: ${found.note}.` : "");
  byId("pushes").replaceChildren(
    list(`For “${label}”`, pushes.filter(({ push }) => push > 0).sort((a, b) => b.push - a.push)),
    list(`Against “${label}”`, pushes.filter(({ push }) => push < 0).sort((a, b) => a.push - b.push)),
  );
  const fields = model().text_columns.filter((name) => row[name].trim());
  byId("read").replaceChildren(
    ...fields.flatMap((name) => [
      ...(fields.length > 1 ? [make("h4", {}, name)] : []),
      make("p", {}, ...marked([...row[name]], words.filter((word) => word.field === name), most, isCut)),
    ]),
  );
  byId("legend").hidden = byId("read").hidden = words.length === 0;
  byId("legend-cut").hidden = !isCut;
  byId("mistake-list").replaceChildren(
    ...found.mistakes.map((one) =>
      make(
        "li", {}, `It said “${one.predicted}” with ${percent(one.probability)}; it is “${one.true}”.`,
        make("p", {}, one.text),
      ),
    ),
  );
  byId("mistakes").hidden = found.mistakes.length === 0;
  byId("why").hidden = false;
}

const shorten = (text) => ([...text].length > 40 ? `${[...text].slice(0, 39).join("")}…` : text);

function list(title, pushes) {
  const rows = pushes.slice(0, SHOWN_PUSHES).map(({ name, push }) =>
    make("li", {}, make("span", {}, ...name), make("b", {}, points(push))),
  );
  const none = make("p", { class: "hint" }, "Nothing by itself.");
  return make("div", {}, make("h4", {}, title), rows.length ? make("ul", {}, ...rows) : none);
}

/** A field's characters, with the words that push marked, and what the model did not read. */
function* marked(characters, words, most, isCut) {
  const text = (start, end) => characters.slice(start, end).join("");
  let done = 0;
  for (const { start, end, push } of words) {
    if (Math.abs(push) < Math.max(LEAST, most / 10)) continue;
    yield text(done, start);
    const strong = Math.abs(push) > Math.max(most, DECIDING) / 2 ? " strong" : "";
    yield make("span", { class: `${push > 0 ? "for" : "against"}${strong}`, title: points(push) }, text(start, end));
    done = end;
  }
  const end = isCut ? (words.at(-1)?.end ?? 0) : characters.length;
  yield text(done, end);
  if (end < characters.length) yield make("s", { class: "unread" }, text(end));
}

// What comes in

const share = (counted) => `${Math.round(100 * counted)}%`;
const CHANGES = { none: "as in training", some: "somewhat different", much: "very different" };

async function drawMonitor() {
  const path = `v1/monitor?model=${encodeURIComponent(model().name)}`;
  const { signal } = running;
  const { rows = 0, fewest, missing, quantities = {} } = await ask(path).catch(() => ({})); // the page does without
  if (signal.aborted) return; // who came after draws it
  const compared = rows > 0 && rows >= fewest;
  const measures = Object.entries(quantities);
  const changed = measures.filter(([, { drift }]) => drift !== "none").map(([name]) => name);
  byId("monitor-state").textContent =
    missing ? `There is nothing to compare with: ${missing}.`
    : rows === 0 ? "This model has not been asked yet."
    : rows < fewest ? `${rows} ${rows === 1 ? "text" : "texts"} so far; too few to compare (${fewest} are enough).`
    : changed.length ? `The last ${rows} texts differ from those of training in: ${changed.join(", ")}. Is the model still right?`
    : `The last ${rows} texts are like those of training.`;
  byId("monitor-rows").replaceChildren(
    ...(compared ? measures : []).map(([name, { drift, bins, training, served }]) => {
      const gaps = bins.map((_, place) => Math.abs(served[place] - training[place]));
      const widest = gaps.indexOf(Math.max(...gaps));
      return make(
        "tr", {}, make("th", { scope: "row" }, name), make("td", {}, CHANGES[drift]), make("td", {}, bins[widest]),
        make("td", {}, share(training[widest])), make("td", {}, share(served[widest])),
      );
    }),
  );
  byId("monitor-table").hidden = !compared;
  byId("monitor").hidden = !(missing || measures.length);
}

// The start

async function start() {
  try {
    models = (await ask("v1/models")).models;
  } catch (problem) {
    show("about", problem.field === "key" ? "" : "The server did not tell which models it serves.");
    complain(problem);
    return;
  }
  byId("model").replaceChildren(...models.map(({ name }) => make("option", {}, name)));
  byId("model-choice").hidden = models.length < 2;
  complain(null);
  drawFields();
  drawMonitor();
}

byId("model").addEventListener("change", () => {
  running.abort(); // the answer of the model before
  running = new AbortController();
  byId("answer").hidden = true;
  byId("progress").textContent = "";
  drawFields();
  drawMonitor();
});
byId("key").addEventListener("change", () => models.length || start());
byId("question").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
byId("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) submit();
});
start();
