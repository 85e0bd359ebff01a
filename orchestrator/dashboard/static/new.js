// New training. Photographs are looked at here, then PUT straight to the store by presigned URLs,
// a few at a time; the server checks them again. The order is the API's own, read from the form.

import { sha256 } from "./sha256.js";

const AT_ONCE = 4;
const TRIES = 4;
// An upload that does not move for so long is begun anew.
const STANDSTILL_MS = 60_000;

const $ = (id) => document.getElementById(id);
const form = $("new");
const rules = JSON.parse(form.dataset.rules);
const usual = JSON.parse(form.dataset.usual);
const draft = JSON.parse(form.dataset.draft);
const token = document.querySelector('meta[name="csrf-token"]').content;
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
const many = (count, word, words = `${word}s`) => `${count} ${count === 1 ? word : words}`;

function sizeOf(bytes) {
  for (const [unit, of] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) {
    if (bytes >= of) return `${Number((bytes / of).toPrecision(3))} ${unit}`;
  }
  return `${bytes} B`;
}

// --- asking the server ------------------------------------------------------------------------

class Refused extends Error {
  constructor(message, { errors = [], retryable = false } = {}) {
    super(message);
    this.errors = errors;
    this.retryable = retryable;
  }
}

async function ask(path, { body, headers = {}, signal, part = false } = {}) {
  const said = { "X-CSRFToken": token, "HX-Request": "true", ...headers };
  if (body !== undefined) said["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, {
      method: part ? "GET" : "POST",
      headers: said, signal, body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The server does not answer; your input is kept. Try again.", { retryable: true });
  }
  if (answer.status === 401) {
    throw new Refused("Your login has ended. Log in again in another tab, then try again here.");
  }
  const kind = answer.headers.get("Content-Type") ?? "";
  if (answer.ok) return kind.includes("json") ? answer.json() : answer.text();
  if (kind.includes("json")) {
    const problem = await answer.json();
    throw new Refused(problem.detail, problem);
  }
  throw new Refused(
    answer.status === 400
      ? "This page is older than your login. Load it anew, and try again."
      : `The server answered with HTTP ${answer.status}.`,
    { retryable: answer.status >= 500 },
  );
}

// --- choosing files ---------------------------------------------------------------------------

// name in the dataset → {file, name, kind, state, why, sent, digest, row}
const chosen = new Map();
let dataset = $("report").querySelector("[data-dataset]")?.dataset.dataset ?? null;
let uploading = null; // an AbortController
let opened = null; // {id, uploads: Map name → upload}: announced, not sealed yet

const suffixOf = (name) => name.slice(name.lastIndexOf(".")).toLowerCase();

function kindOf(name) {
  const plain = name.toLowerCase();
  if (plain.endsWith(rules.mask)) return "mask";
  if (plain === rules.list || plain.endsWith(".txt")) return "caption";
  if (plain.endsWith(".zip")) return "zip";
  return rules.suffixes.includes(suffixOf(plain)) ? "photograph" : null;
}

// Why a file cannot be sent at all; "" when it can.
function faultOf(file, name) {
  const kind = kindOf(name);
  if (kind === null) {
    const heic = [".heic", ".heif"].includes(suffixOf(name));
    return heic ? "is HEIC; export it as JPEG" : "is no photograph, caption, mask or zip";
  }
  if (file.size === 0) return "is empty";
  if (file.size > rules.max_bytes) return `has ${sizeOf(file.size)}; at most ${sizeOf(rules.max_bytes)} can be sent`;
  if (name.length > 200) return "has a name of more than 200 characters";
  return "";
}

// Folders are flattened, but for the one of images of the subject's class.
function nameOf(file, path) {
  const parts = (path || file.webkitRelativePath || file.name).split("/");
  const plain = parts.at(-1);
  return parts.slice(0, -1).includes(rules.folder) ? `${rules.folder}/${plain}` : plain;
}

const litter = (name) => name.startsWith(".") || name === "Thumbs.db";

async function add(found) {
  if (uploading) return;
  const bad = [];
  for (const { file, path } of found) {
    const name = nameOf(file, path);
    if (litter(name.split("/").at(-1))) continue;
    let why = faultOf(file, name);
    const same = [...chosen.keys()].find((known) => known.toLowerCase() === name.toLowerCase());
    if (!why && same) why = chosen.get(same).file.size === file.size ? "is here already" : "has the name of another that is here";
    if (!why && chosen.size >= rules.max_files) why = `is one too many: at most ${rules.max_files}`;
    if (why) { bad.push({ name, why }); continue; }
    const item = { file, name, kind: kindOf(name), state: "new", why: "", sent: 0, digest: null };
    chosen.set(name, item);
    show(item);
  }
  say($("bad"), bad, "Not taken");
  opened = null;
  draw();
  await Promise.all(Array.from({ length: 3 }, lookAtThem));
}

const unseen = [];
async function lookAtThem() {
  for (let item = unseen.shift(); item; item = unseen.shift()) {
    await lookAt(item);
    draw();
    estimateSoon();
  }
}

// Its picture in small, its size in pixels, its hash: what can be told without a server.
async function lookAt(item) {
  if (item.kind === "photograph" || item.kind === "mask") {
    try {
      const picture = await createImageBitmap(item.file);
      const { width, height } = picture;
      paint(item, picture);
      picture.close();
      const side = Math.min(width, height);
      if (width * height > rules.max_pixels) return refuse(item, `has ${width}×${height} pixels; at most ${rules.max_pixels / 1e6} million`);
      if (side < rules.min_side) return refuse(item, `is only ${width}×${height} pixels; at least ${rules.min_side} on each side`);
      if (side < rules.small_side) item.why = `only ${width}×${height} pixels; ${rules.small_side} and more train better`;
    } catch {
      // browsers do not show TIFF; the server can
      if (![".tif", ".tiff"].includes(suffixOf(item.name))) return refuse(item, "is no image, whatever its name says, or is damaged");
    }
  }
  try {
    item.digest = await sha256(item.file);
  } catch {
    return refuse(item, "cannot be read any more; was it moved?");
  }
  if (item.kind === "photograph") {
    const twin = [...chosen.values()].find((other) => other !== item && other.kind === item.kind && other.digest === item.digest);
    if (twin) item.why = `the same picture as ${twin.name}; it is kept once`;
  }
  item.state = "ready";
  mark(item);
}

function refuse(item, why) {
  item.state = "bad";
  item.why = why;
  mark(item);
}

// --- showing them -----------------------------------------------------------------------------

function show(item) {
  const row = document.createElement("li");
  row.className = "photo";
  const picture = document.createElement("canvas");
  picture.width = picture.height = 96;
  picture.setAttribute("aria-hidden", "true");
  const name = document.createElement("span");
  name.className = "clip";
  name.textContent = item.name;
  name.title = item.name;
  const words = document.createElement("small");
  const bar = document.createElement("progress");
  bar.max = item.file.size;
  bar.value = 0;
  bar.setAttribute("aria-label", `Upload of ${item.name}`);
  bar.hidden = true;
  const off = document.createElement("button");
  off.type = "button";
  off.className = "off";
  off.textContent = "×";
  off.setAttribute("aria-label", `Remove ${item.name}`);
  off.addEventListener("click", () => {
    const next = row.nextElementSibling ?? row.previousElementSibling;
    chosen.delete(item.name);
    row.remove();
    (next?.querySelector("button") ?? $("files")).focus();
    opened = null;
    draw();
  });
  row.append(picture, name, words, bar, off);
  Object.assign(item, { row, picture, words, bar, off });
  $("photos").append(row);
  unseen.push(item);
  mark(item);
}

function paint(item, picture) {
  const side = Math.min(picture.width, picture.height);
  item.picture.getContext("2d").drawImage(
    picture, (picture.width - side) / 2, (picture.height - side) / 2, side, side, 0, 0, 96, 96,
  );
}

const STATES = {
  new: "◌ being read", ready: "", sending: "", sent: "✔ uploaded", bad: "✖ will not be sent:", failed: "✖ not uploaded:",
};

function mark(item) {
  const { row, words, bar } = item;
  const odd = item.state === "ready" && item.why;
  row.dataset.state = odd ? "odd" : item.state;
  const state = STATES[item.state] || (item.state === "sending" ? `${Math.floor((100 * item.sent) / item.file.size)} %` : "");
  const kind = item.kind === "photograph" ? "" : `${item.kind}, `;
  words.textContent = [
    state || (odd ? "!" : `${kind}${sizeOf(item.file.size)}`),
    item.why && item.state !== "sent" ? item.why : "",
  ].filter(Boolean).join(" ");
  bar.hidden = item.state !== "sending";
  bar.value = item.sent;
}

function say(box, list, title) {
  box.hidden = list.length === 0;
  box.replaceChildren();
  if (list.length === 0) return;
  const head = document.createElement("strong");
  head.textContent = `${title}: ${many(list.length, "file")}`;
  const rows = document.createElement("ul");
  rows.className = "reasons";
  for (const { name, why } of list.slice(0, 50)) {
    const row = document.createElement("li");
    const which = document.createElement("span");
    which.className = "mono";
    which.textContent = name;
    row.append(which, ` ${why}`);
    rows.append(row);
  }
  if (list.length > 50) rows.append(Object.assign(document.createElement("li"), { textContent: `and ${list.length - 50} more` }));
  box.append(head, rows);
}

const stem = (name) => name.toLowerCase().endsWith(rules.mask) ? name.slice(0, -rules.mask.length) : name.slice(0, name.lastIndexOf("."));

function draw() {
  const items = [...chosen.values()];
  const good = items.filter((item) => item.state !== "bad");
  const photos = good.filter((item) => item.kind === "photograph");
  const stems = new Set(photos.map((item) => stem(item.name)));
  const lonely = good.some((item) => item.kind === "zip") ? [] : good
    .filter((item) => ["caption", "mask"].includes(item.kind) && item.name !== rules.list && !stems.has(stem(item.name)))
    .map((item) => ({ name: item.name, why: `is a ${item.kind} without a photograph of the same name` }));
  say($("odd"), lonely, "Belongs to nothing");
  $("picked").hidden = items.length === 0;
  const bytes = good.reduce((sum, item) => sum + item.file.size, 0);
  const captions = good.filter((item) => item.kind === "caption").length;
  $("photos-count").textContent = dataset || items.length === 0 ? "" : [
    many(photos.length, "photograph"), captions ? many(captions, "caption") : "", sizeOf(bytes),
  ].filter(Boolean).join(" · ");
  const reading = items.some((item) => item.state === "new");
  const failed = good.filter((item) => item.state === "failed");
  const usable = photos.length > 0 || good.some((item) => item.kind === "zip");
  $("upload").hidden = uploading !== null || failed.length > 0;
  $("upload").disabled = reading || !usable;
  $("upload").textContent = reading ? "Reading the files…" : usable ? `Upload ${many(good.length, "file")}, ${sizeOf(bytes)}` : "Upload: a photograph is lacking";
  $("again").hidden = $("without").hidden = uploading !== null || failed.length === 0;
  $("stop").hidden = uploading === null;
  $("clear").hidden = uploading !== null;
  $("sending").hidden = !(uploading || failed.length > 0);
  for (const item of items) item.off.hidden = uploading !== null || item.state === "sent";
  $("picking").hidden = dataset !== null;
  drawAll(good);
}

let begun = 0;
function drawAll(good = [...chosen.values()].filter((item) => item.state !== "bad")) {
  const total = good.reduce((sum, item) => sum + item.file.size, 0);
  const sent = good.reduce((sum, item) => sum + (item.state === "sent" ? item.file.size : item.sent), 0);
  const done = good.filter((item) => item.state === "sent").length;
  const failed = good.filter((item) => item.state === "failed").length;
  const seconds = (performance.now() - begun) / 1000;
  const speed = uploading && seconds > 2 ? sent / seconds : 0;
  const left = speed > 0 ? Math.ceil((total - sent) / speed) : 0;
  $("all").max = total || 1;
  $("all").value = sent;
  $("all-words").textContent = [
    `${done} of ${many(good.length, "file")}`, `${sizeOf(sent)} of ${sizeOf(total)}`,
    speed ? `${sizeOf(speed)}/s, ${left} s left` : "", failed ? `${failed} failed` : "",
  ].filter(Boolean).join(" · ");
}

// --- uploading --------------------------------------------------------------------------------

function put(item, upload, signal) {
  return new Promise((done, fail) => {
    const request = new XMLHttpRequest();
    let idle = 0;
    const moved = () => {
      clearTimeout(idle);
      idle = setTimeout(() => { fail(new Refused("it stood still for a minute")); request.abort(); }, STANDSTILL_MS);
    };
    request.upload.addEventListener("progress", ({ loaded }) => {
      item.sent = loaded;
      mark(item);
      drawAll();
      moved();
    });
    request.addEventListener("loadend", () => clearTimeout(idle));
    request.addEventListener("load", () => {
      if (request.status >= 200 && request.status < 300) return done();
      fail(new Refused(`the store answered with HTTP ${request.status}`));
    });
    request.addEventListener("error", () => fail(new Refused("the store cannot be reached from here, or lets no page upload (stoker doctor says which)")));
    request.addEventListener("abort", () => fail(new DOMException("stopped", "AbortError")));
    signal.addEventListener("abort", () => request.abort(), { once: true });
    request.open("PUT", upload.url);
    for (const [name, value] of Object.entries(upload.headers)) {
      if (name.toLowerCase() !== "content-length") request.setRequestHeader(name, value); // the browser's own
    }
    moved();
    request.send(item.file);
  });
}

async function send(item, signal) {
  item.state = "sending";
  item.why = "";
  for (let tried = 1; ; tried++) {
    item.sent = 0;
    mark(item);
    try {
      const late = Date.parse(opened.uploads.get(item.name).expires_at) - Date.now() < 60_000;
      if (tried > 1 || late) await renew([item.name], signal);
      await put(item, opened.uploads.get(item.name), signal);
      item.state = "sent";
      item.sent = item.file.size;
      break;
    } catch (error) {
      if (signal.aborted) {
        item.state = "ready";
        item.sent = 0;
        break;
      }
      if (tried === TRIES) {
        item.state = "failed";
        item.sent = 0;
        item.why = error.message;
        break;
      }
      await wait(1000 * 3 ** (tried - 1) * (0.5 + Math.random()));
    }
  }
  mark(item);
  drawAll();
}

async function renew(names, signal) {
  const fresh = await ask(`${form.dataset.datasets}/${opened.id}/uploads`, { body: { names }, signal });
  for (const upload of fresh.data) opened.uploads.set(upload.name, upload);
}

async function upload() {
  const items = [...chosen.values()].filter((item) => item.state !== "bad");
  uploading = new AbortController();
  const { signal } = uploading;
  wrong("");
  begun = performance.now();
  draw();
  try {
    if (!opened) {
      for (const item of items) item.state = "ready";
      const files = items.map((item) => ({ name: item.name, bytes: item.file.size, sha256: item.digest }));
      const made = await ask(form.dataset.datasets, { body: { files }, signal });
      opened = { id: made.id, uploads: new Map(made.uploads.map((item) => [item.name, item])) };
    }
    const queue = items.filter((item) => item.state !== "sent");
    await Promise.all(Array.from({ length: AT_ONCE }, async () => {
      for (let item = queue.shift(); item && !signal.aborted; item = queue.shift()) await send(item, signal);
    }));
  } catch (error) {
    if (!signal.aborted) wrong(error.message, error.errors, items);
  }
  uploading = null;
  draw();
  if (items.length > 0 && items.every((item) => item.state === "sent")) await seal();
}

async function seal() {
  const { id } = opened;
  try {
    $("report").innerHTML = await ask(`${form.dataset.datasets}/${id}/seal`);
  } catch (error) {
    return wrong(error.message);
  }
  dataset = id;
  const here = new URL(location.href);
  here.searchParams.set("dataset", id);
  history.replaceState(null, "", here); // loading the page anew does not lose the photographs
  draw();
  await followReport();
}

const statusOf = () => $("report").querySelector("[data-dataset]")?.dataset.status;

async function followReport() {
  while (dataset && ["open", "building"].includes(statusOf())) {
    await wait(1000);
    try {
      const part = await ask(`${form.dataset.datasets}/${dataset}`, { part: true });
      if (dataset) $("report").innerHTML = part;
    } catch (error) {
      if (!error.retryable) return wrong(error.message);
    }
  }
  estimateSoon();
}

function anew() {
  dataset = null;
  opened = null;
  for (const item of chosen.values()) item.row.remove();
  chosen.clear();
  $("report").replaceChildren();
  say($("bad"), [], "");
  const here = new URL(location.href);
  here.searchParams.delete("dataset");
  history.replaceState(null, "", here);
  draw();
  $("files").focus();
}

$("files").addEventListener("change", ({ target }) => {
  add([...target.files].map((file) => ({ file })));
  target.value = ""; // so that the same may be chosen again
});
$("folder").addEventListener("change", ({ target }) => {
  add([...target.files].map((file) => ({ file })));
  target.value = "";
});
$("upload").addEventListener("click", upload);
$("again").addEventListener("click", upload);
$("without").addEventListener("click", seal);
$("stop").addEventListener("click", () => uploading?.abort());
$("clear").addEventListener("click", anew);
$("report").addEventListener("click", ({ target }) => { if (target.closest("[data-anew]")) anew(); });
addEventListener("beforeunload", (event) => { if (uploading) event.preventDefault(); });

const drop = $("drop");
for (const name of ["dragenter", "dragover"]) {
  addEventListener(name, (event) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault(); // or the browser would show the file, and the form be gone
    drop.classList.add("over");
  });
}
addEventListener("dragleave", (event) => { if (!event.relatedTarget) drop.classList.remove("over"); });
addEventListener("drop", async (event) => {
  if (!event.dataTransfer?.types.includes("Files")) return;
  event.preventDefault();
  drop.classList.remove("over");
  if (dataset || uploading) return;
  const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  const files = [...event.dataTransfer.files].map((file) => ({ file }));
  add(entries.some((entry) => entry.isDirectory) ? (await Promise.all(entries.map(unfold))).flat() : files);
});

async function unfold(entry) {
  if (entry.isFile) {
    return new Promise((done) => entry.file((file) => done([{ file, path: entry.fullPath }]), () => done([])));
  }
  const reader = entry.createReader();
  const inside = [];
  for (;;) { // a hundred at a time
    const some = await new Promise((done) => reader.readEntries(done, () => done([])));
    if (some.length === 0) break;
    inside.push(...some);
  }
  return (await Promise.all(inside.map(unfold))).flat();
}

// --- the order --------------------------------------------------------------------------------

const field = (name) => form.elements.namedItem(name);
const numberOf = (text) => (text.trim() === "" ? undefined : Number(text));

// The order as the API takes it. Throws Refused where the form itself cannot be read.
function order() {
  let other = {};
  const text = field("other").value.trim();
  if (text) {
    try {
      other = JSON.parse(text);
    } catch (error) {
      throw new Refused("The other recipe keys are not JSON.", { errors: [{ pointer: "/recipe", detail: error.message }] });
    }
    if (typeof other !== "object" || other === null || Array.isArray(other)) {
      throw new Refused("The other recipe keys are no object.", { errors: [{ pointer: "/recipe", detail: 'write {"key": value}' }] });
    }
  }
  const recipe = { ...other, quality: field("quality").value };
  for (const input of form.querySelectorAll("[data-recipe]")) {
    const value = input.type === "number" ? numberOf(input.value) : input.value.trim() || undefined;
    if (value !== undefined) recipe[input.dataset.recipe] = value;
  }
  if (field("flip").checked) recipe.flip = true;
  const prompts = field("sample_prompts").value.split("\n").map((line) => line.trim()).filter(Boolean);
  if (prompts.length > 0) recipe.sample_prompts = prompts;
  const webhook = field("webhook").value.trim();
  const { dataset_id: _, webhook: __, ...kept } = draft;
  return {
    ...kept,
    base: found.of === field("base").value.trim() ? found.base : field("base").value.trim(),
    base_family: field("base_family").value,
    recipe,
    gpu: {
      ...draft.gpu,
      gpu_names: field("gpu_names").value.split(",").map((name) => name.trim()).filter(Boolean),
      max_price: Math.round((numberOf(field("max_price").value) ?? 2) * 1e6),
    },
    max_cost: Math.round((numberOf(field("max_cost").value) ?? 0) * 1e6),
    max_attempts: numberOf(field("max_attempts").value) ?? draft.max_attempts,
    interruptible: field("interruptible").checked,
    ...(webhook ? { webhook: { url: webhook } } : {}),
  };
}

// What is wrong, beside the field that it is about; the rest in one place above the button.
function wrong(message, errors = [], items = []) {
  for (const place of form.querySelectorAll("[data-fault]")) place.hidden = true;
  for (const input of form.querySelectorAll("[aria-invalid]")) input.removeAttribute("aria-invalid");
  const rest = [];
  let first = null;
  for (const { pointer, detail } of errors) {
    const numbered = pointer.match(/^\/files\/(\d+)/);
    if (numbered && items[numbered[1]]) { refuse(items[numbered[1]], detail); continue; }
    let place = null, about = pointer;
    for (; about && !place; about = about.slice(0, about.lastIndexOf("/"))) {
      place = form.querySelector(`[data-fault="${CSS.escape(about)}"]`);
      if (place) break;
    }
    if (!place) { rest.push(`${pointer.slice(1) || "it"}: ${detail}`); continue; }
    place.textContent = about === pointer ? detail : `${pointer.split("/").at(-1)} ${detail}`;
    place.hidden = false;
    const input = form.querySelector(`[data-pointer="${CSS.escape(about)}"]`);
    input?.setAttribute("aria-invalid", "true");
    input?.closest("details")?.setAttribute("open", "");
    first ??= input;
  }
  const box = $("wrong");
  const words = errors.length > rest.length ? "Mend what is marked." : message;
  box.hidden = !message;
  box.textContent = [words, ...rest].filter(Boolean).join(" ");
  return first;
}

let key = newKey();
function newKey() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  if ($("start").getAttribute("aria-busy") === "true") return;
  if (!dataset) {
    wrong("", [{ pointer: "/dataset_id", detail: uploading ? "the photographs are still on their way" : "upload photographs first" }]);
    (uploading ? $("stop") : chosen.size > 0 ? $("upload") : $("files")).focus();
    return;
  }
  $("start").setAttribute("aria-busy", "true");
  try {
    const said = { ...order(), dataset_id: dataset };
    const made = await ask(form.dataset.start, { body: said, headers: { "Idempotency-Key": key } });
    if (!made.webhook_secret) { location.assign(made.url); return; }
    $("secret-text").textContent = made.webhook_secret;
    $("secret-on").href = made.url;
    $("secret").showModal();
  } catch (error) {
    if (!error.retryable) key = newKey(); // after a refusal the next one is another order
    wrong(error.message, error.errors)?.focus();
  }
  $("start").removeAttribute("aria-busy");
});
$("secret").addEventListener("cancel", (event) => event.preventDefault()); // it is shown this once

// --- what a field means that is left empty ----------------------------------------------------

function hints() {
  const means = usual[field("base_family").value]?.[field("quality").value] ?? {};
  for (const [name, value] of Object.entries(means)) field(name).placeholder = value;
  field("seed").placeholder = 0;
}

// --- the base model ---------------------------------------------------------------------------

let found = { of: null, base: "" };
let looking = null;

async function lookUp() {
  const link = field("base").value.trim();
  if (link === found.of) return;
  looking?.abort();
  found = { of: null, base: "" };
  if (!link) return $("found").replaceChildren();
  looking = new AbortController();
  const { signal } = looking;
  $("found").textContent = "Looking it up…";
  try {
    const base = await ask(form.dataset.base, { body: { link }, signal });
    found = { of: link, base: base.base };
    if (base.family) field("base_family").value = base.family;
    showBase(base);
    wrong("");
  } catch (error) {
    if (error.name === "AbortError") return;
    $("found").replaceChildren();
    wrong("", [{ pointer: "/base", detail: error.errors[0]?.detail ?? error.message }]);
  }
  hints();
  estimateSoon();
}

function showBase(base) {
  const box = $("found");
  box.replaceChildren();
  const list = document.createElement("dl");
  list.className = "facts";
  const facts = [
    ["Name", [base.name, base.version].filter(Boolean).join(" · ")], ["Type", base.kind], ["Size", base.bytes ? sizeOf(base.bytes) : ""],
    ["Address", base.base], ["SHA-256", base.sha256],
    ["Its own words", (base.trigger_words ?? []).join(", ")],
  ];
  for (const [title, words] of facts) {
    if (!words) continue;
    const term = document.createElement("dt");
    const says = document.createElement("dd");
    term.textContent = title;
    says.textContent = words;
    if (["Address", "SHA-256"].includes(title)) says.className = "mono";
    list.append(term, says);
  }
  box.append(list);
  if (base.fault) {
    const fault = document.createElement("p");
    fault.className = "notice error";
    fault.textContent = base.fault;
    box.append(fault);
  }
}

let typing = 0;
field("base").addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(lookUp, 600);
});
field("base").addEventListener("change", () => { clearTimeout(typing); lookUp(); });

// --- price and time ---------------------------------------------------------------------------

let asking = null;
let due = 0;

function estimateSoon() {
  clearTimeout(due);
  due = setTimeout(estimate, 500);
}

async function estimate() {
  if (!field("base").value.trim()) return;
  asking?.abort();
  asking = new AbortController();
  const { signal } = asking;
  const box = $("estimate");
  box.setAttribute("aria-busy", "true");
  try {
    const good = [...chosen.values()].filter((item) => item.state !== "bad");
    const photos = good.filter((item) => item.kind === "photograph");
    const bytes = good.reduce((sum, item) => sum + item.file.size, 0);
    const about = dataset ? { dataset_id: dataset }
      : photos.length > 0 ? { images: photos.length, bytes } : {};
    box.innerHTML = await ask(form.dataset.estimate, { body: { ...order(), ...about }, signal });
    wrong("");
  } catch (error) {
    if (error.name === "AbortError") return;
    const words = document.createElement("p");
    words.className = "muted";
    words.textContent = error.errors?.length ? "Mend what is marked, and price and time are reckoned." : error.message;
    box.replaceChildren(words);
    wrong("", error.errors);
  }
  box.removeAttribute("aria-busy");
}

form.addEventListener("change", ({ target }) => {
  if (target.type === "file" || target.name === "base") return;
  hints();
  estimateSoon();
});
form.addEventListener("input", ({ target }) => { if (["text", "number"].includes(target.type) && target.name !== "base") estimateSoon(); });

hints();
draw();
if (dataset) followReport();
if (field("base").value) lookUp();
