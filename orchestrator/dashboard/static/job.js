// The Job page: its loss curve, its samples, its log.

// --- the curve ---------------------------------------------------------------------------------

const plot = document.getElementById("plot");
const smoothing = document.getElementById("smoothing");
const logY = document.getElementById("log-y");
const clip = document.getElementById("clip");

// By curve: "attempt step" -> [attempt, step, value]. A step that comes again replaces itself.
const curves = { loss: new Map(), validation_loss: new Map() };
let checkpoints = [];
let chart = null;
let shape = "";

function take(points) {
  for (const name of Object.keys(curves)) {
    for (const point of points[name] ?? []) curves[name].set(`${point[0]} ${point[1]}`, point);
  }
}

async function load() {
  try {
    const answer = await fetch(plot.dataset.url, { headers: { "HX-Request": "true" } });
    if (!answer.ok) return;
    const found = await answer.json();
    for (const known of Object.values(curves)) known.clear();
    take(found);
    checkpoints = found.checkpoints;
    draw();
  } catch { /* the line is gone; the page says so, and comes back by itself */ }
}

const colour = (name) => {
  // CSS gives light and dark as one value; a canvas wants what it comes to.
  const probe = document.createElement("span");
  probe.className = name;
  plot.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
};

// An exponential mean that does not begin at zero. Clipped outliers do not pull at it.
function smoothed(values, weight) {
  let mean = 0;
  let seen = 0;
  const [low, high] = clip.checked ? range(values) : [-Infinity, Infinity];
  return values.map((value) => {
    if (value == null || value < low || value > high) return null;
    mean = weight * mean + (1 - weight) * value;
    seen += 1;
    return mean / (1 - weight ** seen);
  });
}

function series() {
  const byAttempt = (name) => {
    const found = new Map();
    for (const [attempt, step, value] of curves[name].values()) {
      if (!found.has(attempt)) found.set(attempt, new Map());
      found.get(attempt).set(step, value);
    }
    return [...found.entries()].sort((a, b) => a[0] - b[0]);
  };
  const loss = byAttempt("loss");
  const validation = byAttempt("validation_loss");
  const steps = [...new Set([...loss, ...validation].flatMap(([, values]) => [...values.keys()]))];
  steps.sort((a, b) => a - b);
  const column = (values) => steps.map((step) => values.get(step) ?? null);
  return { steps, loss, validation, column };
}

const number = (value) => (value == null ? "–" : Number(value.toPrecision(4)).toString());

// The highest and lowest that are worth the room: all but the outermost 2 %.
function range(values) {
  const sorted = values.filter((value) => value != null && (!logY.checked || value > 0)).sort((a, b) => a - b);
  if (!sorted.length) return [0, 1];
  const cut = clip.checked && sorted.length > 20 ? Math.floor(sorted.length * 0.02) : 0;
  const [low, high] = [sorted[cut], sorted[sorted.length - 1 - cut]];
  if (logY.checked) return [low / 1.1, high * 1.1];
  const pad = (high - low || Math.abs(high) || 1) * 0.06;
  return [low - pad, high + pad];
}

function marks(u) {
  const { ctx, bbox } = u;
  ctx.save();
  ctx.beginPath();
  ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
  ctx.clip();
  ctx.font = `${14 * devicePixelRatio}px system-ui`;
  const [plain, best] = [colour("muted"), colour("ok")];
  const last = checkpoints.findLastIndex(([, , isBest]) => isBest);
  checkpoints.forEach(([, step], index) => {
    const x = Math.round(u.valToPos(step, "x", true));
    ctx.strokeStyle = ctx.fillStyle = index === last ? best : plain;
    ctx.globalAlpha = index === last ? 1 : 0.55;
    ctx.lineWidth = devicePixelRatio;
    ctx.setLineDash(index === last ? [] : [3 * devicePixelRatio, 3 * devicePixelRatio]);
    ctx.beginPath();
    ctx.moveTo(x, bbox.top);
    ctx.lineTo(x, bbox.top + bbox.height);
    ctx.stroke();
    if (index !== last) return;
    ctx.textAlign = x > bbox.left + bbox.width / 2 ? "right" : "left"; // whole at either edge
    ctx.fillText(" ★ ", x, bbox.top + 14 * devicePixelRatio);
  });
  ctx.restore();
}

function draw() {
  const { steps, loss, validation, column } = series();
  if (!steps.length) return;
  const weight = Number(smoothing.value);
  const tints = ["s-training", "s-pendingGpu", "s-pendingModel", "s-stalled", "s-pendingImages"];
  const data = [steps];
  const lines = [{ label: "step" }];
  const many = Math.max(loss.length, validation.length) > 1;
  const of = (attempt) => (many ? `, attempt ${attempt}` : "");
  const value = (_, found) => number(found);
  for (const [attempt, values] of loss) {
    const tint = colour(tints[(attempt - 1) % tints.length]);
    const raw = column(values);
    if (weight > 0) {
      data.push(raw);
      lines.push({ label: `each step${of(attempt)}`, stroke: tint, alpha: 0.28, width: 1, spanGaps: true, points: { show: false }, value });
    }
    data.push(weight > 0 ? smoothed(raw, weight) : raw);
    lines.push({ label: `loss${of(attempt)}`, stroke: tint, width: 2, spanGaps: true, points: { show: values.size < 3 }, value });
  }
  for (const [attempt, values] of validation) {
    const tint = colour(many && attempt > 1 ? "s-failed" : "s-completed");
    data.push(column(values));
    lines.push({ label: `validation${of(attempt)}`, stroke: tint, width: 1.5, dash: [4, 4], spanGaps: true, points: { show: true, size: 8, fill: tint, stroke: tint }, value });
  }
  const ink = colour("muted");
  const grid = { stroke: colour("grid-line"), width: 1 };
  const wanted = JSON.stringify([lines.map((line) => [line.label, String(line.stroke)]), logY.checked, ink]);
  const limits = () => range(data.slice(1).flat());
  if (chart && wanted === shape) {
    chart.setData(data);
  } else {
    chart?.destroy();
    shape = wanted;
    const axis = { stroke: ink, grid, ticks: { stroke: grid.stroke, width: 1 }, font: "12px system-ui" };
    chart = new uPlot({
      width: plot.clientWidth || 300,
      height: 280,
      cursor: { drag: { x: true, y: false } },
      scales: { x: { time: false }, y: { distr: logY.checked ? 3 : 1, range: () => limitsNow() } },
      series: lines,
      axes: [axis, { ...axis, size: 58, values: (_, found) => found.map((one) => (one == null ? "" : number(one))) }],
      hooks: { draw: [marks] },
      legend: { live: true },
    }, data, plot);
  }
  limitsNow = limits;
  chart.setData(data);
  table(loss, validation);
}
let limitsNow = () => [0, 1];

// The same in words: every validation and checkpoint, and some steps between.
function table(loss, validation) {
  const body = document.querySelector("#curve-values tbody");
  if (!document.getElementById("curve-values").open) return;
  const rows = [];
  const attempts = [...new Set([...loss, ...validation].map(([attempt]) => attempt))].sort((a, b) => a - b);
  for (const attempt of attempts) {
    const losses = new Map(loss).get(attempt) ?? new Map();
    const valid = new Map(validation).get(attempt) ?? new Map();
    const marked = new Map(checkpoints.filter(([of]) => of === attempt).map(([, step, best]) => [step, best]));
    const steps = [...new Set([...losses.keys(), ...valid.keys()])].sort((a, b) => a - b);
    const every = Math.max(1, Math.ceil(steps.length / 40));
    steps.forEach((step, index) => {
      const worth = valid.has(step) || marked.has(step) || index % every === 0 || index === steps.length - 1;
      if (!worth) return;
      rows.push([step, attempt, number(losses.get(step)), number(valid.get(step)), marked.has(step) ? (marked.get(step) ? "★ best so far" : "yes") : ""]);
    });
  }
  body.replaceChildren(...rows.map((cells) => {
    const row = document.createElement("tr");
    cells.forEach((cell, index) => {
      const element = document.createElement("td");
      if (index === 2 || index === 3) element.className = "num";
      element.textContent = cell;
      row.append(element);
    });
    return row;
  }));
}

document.getElementById("curve-values").addEventListener("toggle", draw);
for (const tool of [smoothing, logY, clip]) tool.addEventListener("input", draw);
new ResizeObserver(() => chart?.setSize({ width: plot.clientWidth, height: 280 })).observe(plot);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { shape = ""; draw(); });

// --- the log -----------------------------------------------------------------------------------

const follow = document.getElementById("follow");
const toEnd = () => {
  const log = document.getElementById("job-log");
  if (follow.checked) log.scrollTop = log.scrollHeight;
  while (log.childElementCount > 3000) log.firstElementChild.remove();
};
follow.addEventListener("change", toEnd);
document.addEventListener("scroll", ({ target }) => {
  // Who scrolls up wants to read; who scrolls to the end wants to follow.
  if (target.id === "job-log") follow.checked = target.scrollTop + target.clientHeight > target.scrollHeight - 24;
}, true);

// --- what comes in -----------------------------------------------------------------------------

let marked = document.getElementById("job-checkpoints").textContent;
document.addEventListener("htmx:after:swap", () => {
  const news = document.getElementById("curve-news");
  if (news.hasAttribute("data-all")) {
    news.removeAttribute("data-all");
    load();
  } else if (news.value) {
    take(JSON.parse(news.value));
    news.value = "";
    draw();
  }
  const now = document.getElementById("job-checkpoints").textContent;
  if (now !== marked) {
    marked = now;
    load();
  }
  toEnd();
});

// --- samples -----------------------------------------------------------------------------------

const lightbox = document.getElementById("lightbox");
let shown = null;

function show(button) {
  shown = button.id;
  lightbox.querySelector("img").src = button.querySelector("img").src;
  lightbox.querySelector("img").alt = button.getAttribute("aria-label");
  lightbox.querySelector("h2").textContent = button.getAttribute("aria-label");
  if (!lightbox.open) lightbox.showModal();
}

function beside(way) {
  const button = document.getElementById(shown);
  if (!button) return;
  const row = [...document.querySelectorAll(`[data-lightbox="${button.dataset.lightbox}"]`)];
  const next = row[row.indexOf(button) + way];
  if (next) show(next);
}

document.addEventListener("click", ({ target }) => {
  const button = target.closest("[data-lightbox]");
  if (button) show(button);
  const step = target.closest("[data-step]");
  if (step) beside(Number(step.dataset.step));
});
lightbox.addEventListener("keydown", ({ key }) => {
  if (key === "ArrowLeft") beside(-1);
  if (key === "ArrowRight") beside(1);
});
lightbox.addEventListener("close", () => document.getElementById(shown)?.focus());

load();
toEnd();
