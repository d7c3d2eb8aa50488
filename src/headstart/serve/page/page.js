// The page of `headstart serve`: texts and tables go to the server that sent the page, and its answers are shown.
// What comes from a person, a file or a model is only ever put in as text, never as markup.

const USUAL_COLUMNS = ["sentence", "text", "review", "content"]; // as tables.py knows them
const ABSTAIN = "abstain"; // the prediction below the model's least confidence
const REQUESTS = 3; // under way at once, so that the server is never without work
const BATCH_BYTES = 1_000_000; // of texts in a request: the server takes 2 MB
const MOST_SENT = 150_000; // characters of a text: a model reads a few hundred words, and each sign may cost 6 bytes
const MOST_TRIES = 10; // of a request that a busy server puts off
const MOST_FILE = 50_000_000; // bytes
const MOST_ANSWERS = 50; // typed texts that are shown, and rows of a table:
const MOST_ROWS = 10;
const MOST_SHOWN = 1000; // characters of a text, and of what names something:
const MOST_NAME = 80;
const MOST_BARS = 6;

const page = (id) => document.getElementById(id);

// --- words

const count = (number) => number.toLocaleString("en");
const plural = (number, thing) => `${count(number)} ${thing}${number === 1 ? "" : "s"}`;
const score = (share) => share.toFixed(3);
const signed = (number) => (number < 0 ? "−" : "+") + Math.abs(number).toFixed(2);

function element(tag, ...content) {
  const node = document.createElement(tag);
  node.append(...content);
  return node;
}

/** Foreign words: cut, and kept from turning the direction of what is around them. */
function quoted(text, most = MOST_NAME) {
  const signs = [...text.slice(0, 2 * most)]; // a sign may be two of JavaScript's units
  return element("bdi", signs.slice(0, most).join(""), signs.length > most ? "…" : "");
}

/** Nodes with a comma between each two. */
const listed = (nodes) => nodes.flatMap((node, i) => (i ? [", ", node] : [node])).flat();

function say(place, ...words) {
  place.classList.remove("problem");
  place.replaceChildren(...words);
}

function complain(place, error) {
  place.classList.add("problem");
  place.replaceChildren(quoted(error.message, MOST_SHOWN));
}

// --- the server

let key = ""; // kept nowhere else
let keyAsked = null; // the promise of another key, while the form is open

/** Resolves once the person has given an API key. */
function askForKey() {
  const form = page("key-form");
  keyAsked ??= new Promise((resolve) => {
    say(page("status"), key ? "The server does not accept this API key." : "This server asks for its API key.");
    form.hidden = false;
    page("key").focus();
    form.onsubmit = (event) => {
      event.preventDefault();
      key = page("key").value;
      form.reset();
      form.hidden = true;
      keyAsked = null;
      say(page("status"));
      resolve();
    };
  });
  return keyAsked;
}

/** What `waited` comes to, or an AbortError as soon as the signal says so. */
function unlessAborted(waited, signal) {
  signal?.throwIfAborted();
  const aborted = new Promise((_, reject) => {
    signal?.addEventListener("abort", () => reject(signal.reason), { once: true });
  });
  return Promise.race([waited, aborted]);
}

/**
 * The server's answer to GET, or to POST of a body. A busy server is asked again when it wants to be: `busy` is called
 * with the seconds until then. Throws an Error for people, or an AbortError.
 */
async function ask(path, body, { signal, busy = () => {} } = {}) {
  for (let tries = 1; ; tries++) {
    const used = key;
    const headers = { Accept: "application/json" };
    if (body) headers["Content-Type"] = "application/json";
    if (used) headers.Authorization = `Bearer ${used}`;
    const request = { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal };
    let response, answer;
    try {
      response = await fetch(path, request);
      answer = await response.text();
    } catch (error) {
      signal?.throwIfAborted();
      throw new Error("The server does not answer. Is headstart serve still running?", { cause: error });
    }
    if (response.status === 401) {
      if (used === key) await unlessAborted(askForKey(), signal);
      continue;
    }
    const pause = Number(response.headers.get("Retry-After"));
    if (tries < MOST_TRIES && (response.status === 429 || (response.status === 503 && pause))) {
      const seconds = Math.min(Math.max(pause || 1, tries), 60);
      busy(seconds);
      await unlessAborted(new Promise((resolve) => setTimeout(resolve, 1000 * seconds)), signal);
      continue;
    }
    return parsed(response, answer);
  }
}

function parsed(response, answer) {
  let content;
  try {
    content = JSON.parse(answer);
  } catch (error) {
    throw new Error(`The server's answer (${response.status}) is not JSON.`, { cause: error });
  }
  if (response.ok) return content;
  const said = typeof content?.error === "string" ? content.error : "It does not say why.";
  throw new Error(response.status === 429 ? `The server is too busy. ${said}` : said);
}

let info = null; // what the server says of its model, once it has
let infoAsked = null; // the promise of that

/** Resolves once `info` is there; asks again if that failed before. */
function model() {
  const busy = (seconds) => say(page("status"), `The server is not ready; asking again in ${seconds} s.`);
  infoAsked ??= ask("info", null, { busy }).then(
    (found) => {
      info = found;
      say(page("status"));
      describe();
    },
    (error) => {
      infoAsked = null;
      throw error;
    },
  );
  return infoAsked;
}

// --- scoring

/** Whether a text has nothing to score: Python's `str.strip`, which decides, knows other spaces than JavaScript's. */
const isBlank = (text) => !/[^\s\x1c-\x1f\x85]|\ufeff/.test(text);

/** The text as it is sent: the start of one that no model reads to its end, and no half of a character. */
const sendable = (text, most = MOST_SENT) => text.slice(0, most).toWellFormed();

/** Lists of row numbers that go into a request each: of the texts that have no answer yet. */
function* batches(texts, answers) {
  const bytes = new TextEncoder();
  let batch = [];
  let size = 0;
  for (const [row, text] of texts.entries()) {
    if (answers[row] !== undefined) continue;
    const more = bytes.encode(JSON.stringify(sendable(text))).length;
    if (batch.length && (batch.length === info.max_client_batch_size || size + more > BATCH_BYTES)) {
      yield batch;
      batch = [];
      size = 0;
    }
    batch.push(row);
    size += more;
  }
  if (batch.length) yield batch;
}

/**
 * Fill in `answers`, a place a text: `{prediction, confidence, shares}`, the shares in the order of the labels, or null
 * for a blank text. Those that are there already stay, so that what was broken off can go on. `advance` gets how many
 * came.
 */
async function scoreAll(texts, answers, { advance, ...options }) {
  const waiting = batches(texts, answers); // which all of them draw from
  async function work() {
    for (const rows of waiting) {
      const inputs = rows.map((row) => [sendable(texts[row])]);
      const found = await ask("predict", { inputs, truncate: true }, options);
      rows.forEach((row, i) => (answers[row] = answerOf(found[i])));
      advance(rows.length);
    }
  }
  await Promise.all(Array.from({ length: REQUESTS }, work));
}

function answerOf(found) {
  let [{ label, score: confidence }] = found; // the best
  const share = new Map(found.map((one) => [one.label, one.score]));
  const shares = Float64Array.from(info.labels, (name) => share.get(name)); // small: there may be very many texts
  if (info.problem === "multi") {
    label = info.labels.filter((_, i) => isSaid(shares, i)).join("|"); // as in a table
    confidence = shares.reduce((all, one, i) => all * (isSaid(shares, i) ? one : 1 - one), 1);
  }
  return { prediction: confidence >= info.min_confidence ? label : ABSTAIN, confidence, shares };
}

/** Whether a text has a label, of several. */
const isSaid = (shares, label) => info.problem === "multi" && shares[label] >= info.thresholds[label];

/** A section that scores: it shows progress, can be cancelled, and says in words how it went. */
function scorer(section, thing) {
  const status = section.querySelector(".status");
  const running = section.querySelector(".running");
  const progress = running.querySelector("progress");
  let current = new AbortController();
  running.querySelector(".cancel").addEventListener("click", () => current.abort());

  /** Whether all texts were scored; not if that failed, was cancelled, or gave way to something else. */
  async function run(texts, answers, shown = () => {}) {
    stop();
    const mine = current;
    texts.forEach((text, row) => isBlank(text) && (answers[row] = null));
    let done = answers.filter((answer) => answer !== undefined).length;
    const advance = (more) => {
      done += more;
      progress.max = texts.length;
      progress.value = done;
      running.querySelector(".told").textContent = `${count(done)} of ${plural(texts.length, thing)}`;
      shown();
    };
    const busy = (seconds) => {
      running.hidden = false;
      say(status, `The server is busy; the next try is in ${seconds} s.`);
    };
    say(status, `Scoring ${plural(texts.length, thing)}.`);
    try {
      await unlessAborted(model(), mine.signal);
      running.hidden = texts.length <= info.max_client_batch_size;
      advance(0);
      await scoreAll(texts, answers, { advance, busy, signal: mine.signal });
      if (current !== mine) return false;
      say(status, ...outcome(answers, thing));
      return true;
    } catch (error) {
      if (current !== mine) return false;
      if (mine.signal.aborted) say(status, `Cancelled after ${count(done)} of ${plural(texts.length, thing)}.`);
      else complain(status, error);
      return false;
    } finally {
      mine.abort(); // requests that are still under way after one of them failed
      if (current === mine) hideRunning();
    }
  }

  function hideRunning() {
    if (running.contains(document.activeElement)) status.focus();
    running.hidden = true;
  }

  /** Let what is running end without a word. */
  function stop() {
    current.abort();
    current = new AbortController();
    hideRunning();
    say(status);
  }

  return { run, stop, status };
}

/** Labels, `abstain` among them, with the number of texts that got each: the commonest first. */
function tally(answers) {
  const counts = new Map();
  for (const answer of answers) {
    if (answer) counts.set(answer.prediction, (counts.get(answer.prediction) ?? 0) + 1);
  }
  return [...counts].sort(([, less], [, more]) => more - less);
}

/** What scoring came to, in words. */
function outcome(answers, thing) {
  if (answers.length === 1 && answers[0]) {
    return [quoted(answers[0].prediction || "No label"), `, with a confidence of ${score(answers[0].confidence)}.`];
  }
  const counts = tally(answers);
  const blank = answers.filter((answer) => answer === null).length;
  const labels = counts.slice(0, 5).map(([label, number]) => [`${count(number)} `, quoted(label || "no label")]);
  if (counts.length > 5) labels.push(`and ${plural(counts.length - 5, "other label")}`);
  return [
    `${plural(answers.length - blank, thing)} scored`,
    ...(labels.length ? [": ", ...listed(labels)] : []),
    blank ? `. ${plural(blank, thing)} without text got no label.` : ".",
  ];
}

// --- tables: read as tables.py reads them, and refused in its words

const isTabbed = (name) => /\.tsv$/i.test(name);

/** A file's `columns` and `rows`, all strings and as long as the header; an Error for people if it is no such table. */
async function readTable(file) {
  if (/\.(xlsx?|ods|parquet|jsonl?|ndjson|gz|zip)$/i.test(file.name)) {
    throw new Error("This page reads .csv and .tsv. Save the table as one (in Excel: «CSV UTF-8»).");
  }
  if (file.size > MOST_FILE) {
    throw new Error("The file is too large for a browser. Use: headstart predict RUN --input FILE --output FILE");
  }
  const text = decoded(await file.arrayBuffer());
  const lines = parseCsv(text, delimiterOf(text, isTabbed(file.name)));
  const columns = (lines.shift() ?? []).map((name) => name.replaceAll("\ufeff", "").trim());
  const repeated = columns.find((name, i) => name && columns.indexOf(name) < i);
  if (repeated !== undefined) throw new Error(`The column '${repeated}' appears twice. Rename one of them.`);
  const long = lines.flatMap((cells, i) => (cells.length > columns.length ? [i + 2] : []));
  if (long.length) {
    const some = long.slice(0, 8).join(", ") + (long.length > 8 ? ", …" : "");
    throw new Error(
      `More fields than the header's ${columns.length}: row ${some}. Put quotes around texts that hold the delimiter.`,
    );
  }
  if (!lines.length) throw new Error("The file has a header and no rows.");
  const rows = lines.map((cells) => (cells.length < columns.length ? columns.map((_, i) => cells[i] ?? "") : cells));
  return { columns, rows };
}

function decoded(buffer) {
  const head = new Uint8Array(buffer, 0, Math.min(2, buffer.byteLength));
  if ((head[0] === 0xff && head[1] === 0xfe) || (head[0] === 0xfe && head[1] === 0xff)) {
    throw new Error("The file is UTF-16, not UTF-8. Save it as UTF-8 (in Excel: «CSV UTF-8»).");
  }
  let text;
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(buffer); // which drops a byte-order mark
  } catch (error) {
    throw new Error("The file is not UTF-8; probably latin-1. Save it as UTF-8 (in Excel: «CSV UTF-8»).", {
      cause: error,
    });
  }
  if (text.includes("\0")) throw new Error("The file has a NUL byte: it is a binary file, or a damaged one.");
  if (!text.trim()) throw new Error("The file is empty.");
  return text.replace(/^[\r\n]+/, "");
}

/** What parts the header into most of the usual columns, or else into most columns. */
function delimiterOf(text, tabbed) {
  const header = text.slice(0, text.search(/\n|$/)).replace(/\r$/, "");
  if (header.includes("\r")) {
    throw new Error("The file's lines end as on an old Mac. Save it with other line ends.");
  }
  const known = [...USUAL_COLUMNS, "label", "labels", "target", "sentiment"];
  const worth = (delimiter) => {
    const names = header.split(delimiter).map((name) => name.replace(/^\s*"|"\s*$/g, "").trim().toLowerCase());
    return [names.filter((name) => known.includes(name)).length, names.length];
  };
  const better = (one, other) => one[0] - other[0] || one[1] - other[1];
  return tabbed ? "\t" : [...",;\t|"].reduce((best, one) => (better(worth(one), worth(best)) > 0 ? one : best));
}

/** Rows of cells, by RFC 4180: quotes around a cell, doubled within; lines that end in LF or CR LF. */
function parseCsv(text, delimiter) {
  const rows = [];
  let row = [];
  let at = 0;
  do {
    const number = rows.length + 1;
    let cell = "";
    const isQuoted = text[at] === '"';
    while (text[at] === '"') {
      const close = text.indexOf('"', at + 1);
      if (close < 0) throw new Error(`Row ${number} opens a quote that is never closed. Close it, or double it.`);
      cell += (text[at - 1] === '"' ? '"' : "") + text.slice(at + 1, close);
      at = close + 1;
    }
    let end = at;
    while (end < text.length && text[end] !== delimiter && text[end] !== "\n") end++;
    const isLast = text[end] !== delimiter; // of its row
    const rest = isLast && text[end - 1] === "\r" && end > at ? text.slice(at, end - 1) : text.slice(at, end);
    if (isQuoted && rest) {
      throw new Error(`Row ${number} has a lone quote. Put quotes around the text, and double the one inside.`);
    }
    row.push(cell + rest);
    at = end + 1;
    if (isLast) {
      rows.push(row);
      row = [];
    }
  } while (at < text.length || row.length);
  return rows;
}

/** The place of the text column, as `headstart predict` finds it, or -1. */
function findTextColumn(columns) {
  if (columns.includes(USUAL_COLUMNS[0])) return columns.indexOf(USUAL_COLUMNS[0]);
  const found = columns.flatMap((name, i) => (USUAL_COLUMNS.includes(name.toLowerCase()) ? [i] : []));
  return found.length === 1 ? found[0] : -1;
}

/** What a spreadsheet would compute gets an apostrophe (CSV injection, OWASP); numbers stay. */
const forSpreadsheets = (cell) => (/^[=+\-@\t\r]/.test(cell) && !/^[+-]?[\d.,]+$/.test(cell) ? `'${cell}` : cell);

function csvLine(cells) {
  const safe = cells.map(forSpreadsheets);
  return safe.map((cell) => (/[",\r\n]/.test(cell) ? `"${cell.replaceAll('"', '""')}"` : cell)).join(",") + "\n";
}

/** CSV of a table with what `headstart predict` adds; as there, a column that has such a name already is replaced. */
function scoredCsv({ columns, rows }, answers) {
  const added = ["prediction", "confidence", ...info.labels.map((label) => `p_${label}`)];
  const header = [...columns, ...added.filter((name) => !columns.includes(name))];
  const places = added.map((name) => header.indexOf(name));
  const lines = rows.map((cells, i) => {
    const line = [...cells];
    const { prediction = "", confidence = "", shares = info.labels.map(() => "") } = answers[i] ?? {};
    [prediction, confidence, ...shares].map(String).forEach((cell, k) => (line[places[k]] = cell));
    return csvLine(line);
  });
  return new Blob([csvLine(header), ...lines], { type: "text/csv;charset=utf-8" });
}

function offerDownload(link, blob, name) {
  if (link.href) URL.revokeObjectURL(link.href);
  link.href = URL.createObjectURL(blob);
  link.download = name;
}

// --- answers

const copyOf = (id) => page(id).content.firstElementChild.cloneNode(true);

/** Fill a list with bars: [name, share from 0 to 1, number in words] each. */
function drawBars(list, bars) {
  const items = bars.map(([name, share, number]) => {
    const item = copyOf("bar-template");
    item.querySelector(".name").append(quoted(name));
    item.querySelector(".fill").style.setProperty("--share", share);
    item.querySelector(".number").textContent = number;
    return item;
  });
  list.replaceChildren(...items);
}

function drawSummary(result, answers) {
  const counts = tally(answers);
  const all = counts.reduce((sum, [, number]) => sum + number, 0);
  const bars = counts.map(([label, number]) => {
    return [label || "no label", number / all, `${count(number)} (${Math.round((100 * number) / all)}%)`];
  });
  drawBars(result.querySelector(".summary"), bars.slice(0, 20));
}

function drawAnswer(text, { confidence, shares }) {
  const item = copyOf("answer-template");
  item.querySelector(".text").replaceChildren(quoted(text, MOST_SHOWN));
  const isSure = confidence >= info.min_confidence;
  const verdict = item.querySelector(".verdict");
  verdict.hidden = isSure;
  verdict.append(element("strong", ABSTAIN), `: no label has a probability of ${info.min_confidence}`);
  item.querySelector(".best").classList.toggle("unsure", !isSure);
  const bars = info.labels.map((label, i) => [label, shares[i], score(shares[i]) + (isSaid(shares, i) ? " ✓" : "")]);
  bars.sort(([, less], [, more]) => more - less);
  const few = bars.length > MOST_BARS ? MOST_BARS - 1 : bars.length;
  drawBars(item.querySelector(".best"), bars.slice(0, few));
  drawBars(item.querySelector(".others .bars"), bars.slice(few));
  item.querySelector(".others").hidden = few === bars.length;
  item.querySelector(".others summary").textContent = plural(bars.length - few, "other label");
  const why = item.querySelector(".why");
  why.hidden = !info.explains;
  why.ariaLabel = `Why? ${text.slice(0, MOST_NAME)}`;
  why.addEventListener("click", () => toggleExplanation(item, text));
  return item;
}

/** Show why a text got its label, or hide that again. */
async function toggleExplanation(item, text) {
  const why = item.querySelector(".why");
  const status = item.querySelector(".status");
  const shown = why.ariaExpanded === "true";
  why.ariaExpanded = String(!shown);
  item.querySelector(".explanation").hidden = true;
  if (shown) {
    item.querySelector(".text").replaceChildren(quoted(text, MOST_SHOWN));
    say(status);
    return;
  }
  const busy = (seconds) => say(status, `The server is busy; the next try is in ${seconds} s.`);
  say(status, "Looking for the words that count.");
  try {
    const read = 100 * info.max_input_length; // characters, and more: a token is seldom longer than a word
    const found = await ask("explain", { inputs: sendable(text, Math.min(read, MOST_SENT)) }, { busy });
    if (why.ariaExpanded === "false") return;
    drawExplanation(item, found);
  } catch (error) {
    why.ariaExpanded = "false";
    complain(status, error);
  }
}

function drawExplanation(item, { text, label, words }) {
  item.querySelector(".text").replaceChildren(marked(text, words));
  item.querySelector(".label").replaceChildren(quoted(label));
  item.querySelector(".cut").hidden = words.every((word) => word.score !== null);
  const ranked = words.filter((word) => word.score).sort((one, other) => other.score - one.score);
  const strongest = (some) => listed(some.map((word) => [quoted(word.word, 40), ` ${signed(word.score)}`]));
  const helping = ranked.filter((word) => word.score > 0).slice(0, 3);
  const opposing = ranked.filter((word) => word.score < 0).slice(-3).reverse();
  const most = helping.length ? ["For it most: ", ...strongest(helping), ". "] : [];
  if (opposing.length) most.push("Against it most: ", ...strongest(opposing), ".");
  say(item.querySelector(".status"), ...most);
  const rows = words.map((word) => {
    const head = element("th", quoted(word.word));
    head.scope = "row";
    const cell = element("td", word.score === null ? "not read" : signed(word.score));
    cell.className = "number";
    return element("tr", head, cell);
  });
  item.querySelector("tbody").replaceChildren(...rows);
  item.querySelector(".explanation").hidden = false;
}

/** The text, each word marked by how strongly it pushed the decision. */
function marked(text, words) {
  const signs = [...text]; // the places are Python's, which counts characters, not JavaScript's units of 16 bits
  const strongest = words.reduce((most, word) => Math.max(most, Math.abs(word.score ?? 0)), 0);
  const shown = element("bdi");
  let end = 0;
  for (const word of words.filter((one) => one.start < MOST_SHOWN)) {
    const node = element("span", signs.slice(word.start, Math.min(word.end, MOST_SHOWN)).join(""));
    const strength = strongest ? Math.round((3 * Math.abs(word.score ?? 0)) / strongest) : 0;
    if (word.score === null) {
      node.className = "unread";
      node.title = "not read";
    } else {
      node.title = signed(word.score);
      if (strength) node.className = `${word.score > 0 ? "for" : "against"} strength-${strength}`;
    }
    shown.append(signs.slice(end, word.start).join(""), node);
    end = word.end;
  }
  if (signs.length > MOST_SHOWN) shown.append(" …");
  return shown;
}

// --- the section of typed texts

function setUpTexts() {
  const section = page("texts");
  const result = section.querySelector(".result");
  const scoring = scorer(section, "text");
  const field = page("lines");

  async function start() {
    const texts = field.value.split("\n").filter((line) => !isBlank(line));
    result.hidden = true;
    if (!texts.length) {
      scoring.stop();
      say(scoring.status, "There is no text to score yet.");
      field.focus();
      return;
    }
    const answers = new Array(texts.length).fill(undefined);
    if (!(await scoring.run(texts, answers))) return;
    const shown = answers.slice(0, MOST_ANSWERS);
    section.querySelector(".answers").replaceChildren(...shown.map((answer, i) => drawAnswer(texts[i], answer)));
    section.querySelector(".totals").hidden = texts.length === 1;
    drawSummary(result, answers);
    const left = texts.length - shown.length;
    section.querySelector(".more").textContent = left ? `${plural(left, "more text")}: the download has all.` : "";
    const table = { columns: ["text"], rows: texts.map((text) => [text]) };
    offerDownload(section.querySelector(".download"), scoredCsv(table, answers), "texts-scored.csv");
    result.hidden = false;
  }

  section.querySelector("form").addEventListener("submit", (event) => {
    event.preventDefault();
    start();
  });
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      start();
    }
  });
}

// --- the section of a table

function setUpTable() {
  const section = page("table");
  const result = section.querySelector(".result");
  const form = section.querySelector("form");
  const button = form.querySelector(".start");
  const choice = page("column");
  const scoring = scorer(section, "row");
  let latest = null; // the file that was chosen last
  let table = null; // its name, columns and rows, and the answers so far

  async function open(file) {
    latest = file;
    table = null;
    scoring.stop();
    form.hidden = result.hidden = true;
    say(scoring.status, "Reading ", quoted(file.name), ".");
    try {
      const read = await readTable(file);
      if (latest !== file) return;
      table = { name: file.name, ...read };
    } catch (error) {
      if (latest === file) complain(scoring.status, error);
      return;
    }
    const found = findTextColumn(table.columns);
    choice.replaceChildren(...table.columns.map((name, i) => new Option(name || `(column ${i + 1} has no name)`, i)));
    if (found < 0) choice.prepend(new Option("choose a column", ""));
    choice.value = found < 0 ? "" : found;
    form.hidden = false;
    chooseColumn();
    if (choice.value) {
      start();
    } else {
      const question = "Which column has the text? The names are those of the first row.";
      say(scoring.status, quoted(file.name), `: ${plural(table.rows.length, "row")}. ${question}`);
      choice.focus();
    }
  }

  /** Forget the answers, which were to another column, if any. */
  function chooseColumn() {
    scoring.stop();
    table.answers = new Array(table.rows.length).fill(undefined);
    button.hidden = !choice.value;
    button.textContent = `Score ${plural(table.rows.length, "row")}`;
    result.hidden = !choice.value;
    section.querySelector(".totals").hidden = true;
    drawPreview();
  }

  async function start() {
    const { name, rows, answers } = table;
    const texts = rows.map((cells) => cells[choice.value]);
    if (document.activeElement === button) scoring.status.focus();
    button.hidden = true;
    const done = await scoring.run(texts, answers, drawPreview);
    if (table?.answers !== answers) return; // another file or column was chosen meanwhile
    if (done) {
      drawSummary(result, answers);
      const download = section.querySelector(".download");
      offerDownload(download, scoredCsv(table, answers), name.replace(/\.\w+$/, "") + "-scored.csv");
      section.querySelector(".totals").hidden = false;
    } else {
      const left = answers.filter((answer) => answer === undefined).length;
      button.textContent = `Score the other ${plural(left, "row")}`;
      button.hidden = false;
    }
  }

  function drawPreview() {
    const rows = table.rows.slice(0, MOST_ROWS).map((cells, i) => {
      const answer = table.answers[i];
      const head = element("th", quoted(cells[choice.value] ?? "", 200));
      head.scope = "row";
      const sure = element("td", answer ? score(answer.confidence) : "");
      sure.className = "number";
      return element("tr", head, element("td", quoted(answer?.prediction ?? "")), sure);
    });
    const some = table.rows.length > rows.length ? `the first ${rows.length} of ` : "";
    const about = `: ${some}${plural(table.rows.length, "row")}`;
    section.querySelector("caption").replaceChildren(quoted(table.name), about);
    section.querySelector("tbody").replaceChildren(...rows);
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    start();
  });
  choice.addEventListener("change", chooseColumn);
  const input = page("file");
  input.addEventListener("click", () => (input.value = "")); // so that a file that was mended can be chosen again
  input.addEventListener("change", () => input.files.length && open(input.files[0]));
  acceptDrops(section.querySelector(".zone"), open);
}

/** Take a file that is dropped anywhere on the page: beside the zone it would replace the page. */
function acceptDrops(zone, open) {
  const holdsFile = (event) => event.dataTransfer?.types.includes("Files");
  addEventListener("dragover", (event) => {
    if (!holdsFile(event)) return;
    event.preventDefault();
    zone.classList.add("over");
  });
  addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) zone.classList.remove("over");
  });
  addEventListener("drop", (event) => {
    zone.classList.remove("over");
    if (!holdsFile(event)) return;
    event.preventDefault();
    if (event.dataTransfer.files.length) open(event.dataTransfer.files[0]);
  });
}

// --- the model

function describe() {
  const { model_id: name, version, labels, test, limits } = info;
  document.title = `${name}: headstart`;
  page("name").replaceChildren(quoted(name));
  page("about").textContent = `A text classifier for ${count(labels.length)} labels, served by headstart ${version}.`;
  if (test) {
    const [low, high] = test.accuracy_ci95.map(score);
    const texts = plural(test.n, "test text");
    page("score").replaceChildren(
      element("strong", score(test.accuracy)),
      " ",
      element("span", `accuracy on ${texts}, 95% interval ${low} to ${high}`),
    );
  } else {
    page("score").replaceChildren("How good it is was not tested, or is not known here.");
  }
  page("score").hidden = false;
  const named = listed(labels.slice(0, 20).map((label) => quoted(label, 40)));
  const more = labels.length > 20 ? [` and ${count(labels.length - 20)} more`] : [];
  const facts = [
    ["Labels", ...named, ...more],
    ["Reads", `at most ${plural(info.max_input_length, "token")} of a text`],
    ["Probabilities", info.calibrated ? "calibrated on validation data" : "not calibrated"],
  ];
  if (info.min_confidence > 0) {
    facts.push(["Abstains", `below a confidence of ${info.min_confidence}`]);
  }
  if (test) {
    facts.push(["Macro F1", `${score(test.macro_f1)} on test texts`]);
    facts.push(["Calibration", `error ${score(test.ece)} on test texts`]);
  }
  const items = facts.flatMap(([term, ...about]) => [element("dt", term), element("dd", ...about)]);
  page("facts").replaceChildren(...items);
  page("limits").prepend(...limits.map((limit) => element("li", quoted(limit, 400))));
  const address = new URL("predict", document.baseURI).href;
  const header = key ? ' -H "Authorization: Bearer $KEY"' : "";
  page("curl").textContent =
    `curl ${address}${header} -H 'Content-Type: application/json' -d '{"inputs": "your text"}'`;
}

setUpTexts();
setUpTable();
model().catch((error) => complain(page("status"), error));
