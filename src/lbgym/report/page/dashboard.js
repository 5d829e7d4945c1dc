"use strict";
// One picture after the other arrives as a server-sent event; the page keeps what was, and draws.

const SPAN = 300; // seconds that plots show at most
const LEAST_SPAN = 30; // and at least
const MOST_ROWS = 100; // servers in the table; the filter finds the others
const MOST_LINES = 600; // pictures that the strips remember

const past = new Map(); // region -> [{time, new, open, fct, lost}]
const strips = new Map(); // region -> [{time, open: [...], weights: [...]}]
const sections = new Map(); // region -> its part of the page
const sorting = { key: "label", down: false }; // rows that stay where they are
let shown = null; // the region that is shown
let picked = false; // somebody has chosen it
let last = null; // the last picture

const number = (x, digits = 3) =>
  x === null || x === undefined ? "–"
    : Math.abs(x) >= 10000 ? x.toLocaleString("en", { notation: "compact", maximumFractionDigits: 1 })
    : x.toLocaleString("en", { maximumSignificantDigits: digits });
const whole = (x) => (x === null || x === undefined ? "–" : Math.round(x).toLocaleString("en"));
const duration = (s) =>
  s === null || s === undefined ? "–"
    : s < 1e-3 ? `${number(s * 1e6)} µs` : s < 1 ? `${number(s * 1e3)} ms` : s < 120 ? `${number(s)} s`
    : s < 7200 ? `${Math.round(s / 60)} min` : s < 172800 ? `${number(s / 3600)} h` : `${number(s / 86400)} d`;
const sum = (xs) => (xs ? xs.reduce((a, b) => a + (b || 0), 0) : null);

// Columns of the table: title, values, text of a value; null values: this data plane does not measure it.
const COLUMNS = [
  { key: "label", title: "server", text: true, of: (s) => s.labels, show: (x) => x },
  { key: "state", title: "state", text: true, of: (s) => (s.states.every((x) => x === "unknown") ? null : s.states), show: (x) => x },
  { key: "open", title: "open flows", of: (s) => s.open, show: whole, bar: true },
  { key: "weight", title: "weight", of: (s) => s.weights, show: (x) => number(x), bar: true },
  { key: "new", title: "new/s", of: (s) => s.new, show: (x) => number(x) },
  { key: "fct", title: "FCT", of: (s) => s.fct, show: duration },
  { key: "fct_p90", title: "FCT p90", of: (s) => s.fct_p90, show: duration },
  { key: "duration", title: "duration", of: (s) => s.duration, show: duration },
  { key: "duration_p90", title: "duration p90", of: (s) => s.duration_p90, show: duration },
  { key: "cpu", title: "CPU", of: (s) => s.cpu, show: (x) => (x === null ? "–" : `${Math.round(100 * x)} %`) },
  { key: "lost", title: "lost", of: (s) => s.lost, show: whole },
  { key: "completed", title: "completed", of: (s) => s.completed, show: whole },
];

const TILES = [
  { key: "new", label: "New flows per second", show: (x) => number(x) },
  { key: "open", label: "Open flows", show: whole },
  { key: "fct", label: "Mean FCT, last 2 s", show: duration },
  { key: "lost", label: "Lost flows", show: whole },
];

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

/** A canvas' context in CSS pixels, cleared, whatever the screen's density. */
function paper(canvas) {
  const { clientWidth: width, clientHeight: height } = canvas;
  const density = window.devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * density) || canvas.height !== Math.round(height * density)) {
    canvas.width = Math.round(width * density);
    canvas.height = Math.round(height * density);
  }
  const context = canvas.getContext("2d");
  context.setTransform(density, 0, 0, density, 0, 0);
  context.clearRect(0, 0, width, height);
  return { context, width, height };
}

/** Seconds that the plots of these points show. */
const spanOf = (points, now) => (points.length ? Math.min(SPAN, Math.max(LEAST_SPAN, now - points[0].time)) : SPAN);

/** A line over the last seconds, from 0 up; a gap where nothing was published. */
function line(canvas, points, key, now) {
  const span = spanOf(points, now);
  const { context, width, height } = paper(canvas);
  const most = points.reduce((a, p) => Math.max(a, p[key] ?? 0), 0) || 1;
  context.strokeStyle = color("--load");
  context.lineWidth = 1.5;
  context.beginPath();
  let before = null;
  for (const point of points) {
    const value = point[key];
    if (value === null || value === undefined) { before = null; continue; }
    const x = width * (1 - (now - point.time) / span), y = height - 3 - (height - 6) * (value / most);
    if (before !== null && point.time - before < 3) context.lineTo(x, y); else context.moveTo(x, y);
    before = point.time;
  }
  context.stroke();
}

/** A row per server, time from left to right, the darker the larger. */
function strip(canvas, rows, key, now, ink) {
  const { context, width, height } = paper(canvas);
  const span = spanOf(rows, now);
  const kept = rows.filter((row) => row[key]);
  if (!kept.length) return;
  const servers = kept[kept.length - 1][key].length;
  const most = kept.reduce((a, row) => Math.max(a, ...row[key].map((x) => x || 0)), 0) || 1;
  const each = height / servers;
  context.fillStyle = ink;
  for (let i = 0; i < kept.length; i++) {
    const row = kept[i], next = i + 1 < kept.length ? kept[i + 1].time : now;
    const from = width * (1 - (now - row.time) / span);
    const to = width * (1 - (now - Math.min(next, row.time + 3)) / span);
    if (to < 0 || row[key].length !== servers) continue;
    for (let j = 0; j < servers; j++) {
      context.globalAlpha = Math.sqrt((row[key][j] || 0) / most);
      context.fillRect(from, j * each, Math.max(1, to - from + 0.3), Math.max(1, each - (each > 4 ? 1 : 0)));
    }
  }
  context.globalAlpha = 1;
}

function sectionOf(name) {
  let section = sections.get(name);
  if (!section) {
    section = document.getElementById("region").content.firstElementChild.cloneNode(true);
    for (const tile of TILES) {
      const box = element("div", "tile");
      box.append(element("div", "label", tile.label), element("div", `value ${tile.key}`), element("canvas", `plot-${tile.key}`));
      section.querySelector(".tiles").append(box);
    }
    section.querySelector(".filter").addEventListener("input", draw);
    for (const canvas of section.querySelectorAll("figure canvas"))
      canvas.addEventListener("mousemove", (event) => {
        const servers = last.regions.find((one) => one.name === name)?.observation?.servers;
        if (servers) canvas.title = servers.labels[Math.floor((event.offsetY / canvas.clientHeight) * servers.labels.length)] ?? "";
      });
    sections.set(name, section);
    document.getElementById("main").append(section);
  }
  return section;
}

function say(section, which, ...parts) {
  const place = section.querySelector(`.${which}`);
  place.replaceChildren(...parts.map(([text, tone]) => element("span", tone, text)));
}

function heading(section, region) {
  section.querySelector(".name").textContent = region.name;
  const clock = region.clock_rate === 1 ? "" : `, clock × ${number(region.clock_rate)}`;
  section.querySelector(".driver").textContent = `${region.driver}${clock}`;
  const problem = section.querySelector(".problem");
  problem.hidden = !region.problem;
  problem.textContent = region.problem;
  const restarts = region.restarts ? [[`, restarted ${region.restarts} ×`, "warn"]] : [];
  if (region.producer !== "alive")
    say(section, "producer", [`${region.producer}, last heard ${duration(region.heartbeat_age)} ago, waiting`, "bad"], ...restarts);
  else if (region.silent !== null) say(section, "producer", [`silent for ${duration(region.silent)}`, "warn"], ...restarts);
  else say(section, "producer", ["alive", "good"], [`, process ${region.producer_pid}, up ${duration(region.up)}`, ""], ...restarts);
  const tone = { alive: "good", dead: "bad", none: "dim" }[region.agent];
  const process = region.agent_pid === null ? [] : [[`, process ${region.agent_pid}`, ""]];
  const action = region.action;
  const lease = action === null ? [] : [[
    action.lease === null ? ", no lease" : action.lease_left > 0 ? `, lease ${duration(action.lease_left)} left` : ", lease over",
    action.lease !== null && action.lease_left <= 0 ? "warn" : "",
  ]];
  say(section, "agent", [region.agent, tone], ...process, ...lease);
  const seen = region.observation;
  if (seen === null) {
    say(section, "weights", ["–", "dim"]);
    say(section, "observed", ["nothing yet", "dim"]);
    return;
  }
  if (seen.safe) say(section, "weights", ["safe weights in force", "warn"]);
  else {
    const delay = seen.delay === null ? "" : `, in force ${duration(seen.delay.seconds)} after it was written`;
    say(section, "weights", [seen.applied === null ? "of no action" : `of action ${whole(seen.applied)}${delay}`, ""]);
  }
  const rate = seen.rate === null ? "" : `, ${number(seen.rate)}/s`;
  say(section, "observed", [`${whole(seen.sequence_id)}, ${duration(seen.age)} old`, region.stale ? "warn" : ""], [rate, ""]);
}

function table(section, servers, safe) {
  const columns = COLUMNS.map((column) => ({ ...column, values: column.of(servers) })).filter((column) => column.values);
  const head = section.querySelector("thead tr");
  const titles = columns.map((column) => column.key).join();
  if (head.dataset.titles !== titles) {
    head.dataset.titles = titles;
    head.replaceChildren(...columns.map((column) => {
      const cell = element("th", column.text ? "text" : "");
      const button = element("button", "", column.title);
      button.addEventListener("click", () => {
        sorting.down = sorting.key === column.key ? !sorting.down : !column.text;
        sorting.key = column.key;
        draw();
      });
      cell.append(button);
      return cell;
    }));
  }
  columns.forEach((column, k) => {
    if (column.key === sorting.key) head.children[k].setAttribute("aria-sort", sorting.down ? "descending" : "ascending");
    else head.children[k].removeAttribute("aria-sort");
  });
  const wanted = section.querySelector(".filter").value.trim().toLowerCase();
  const all = servers.labels.map((_, j) => j);
  let which = all.filter((j) => !wanted || servers.labels[j].toLowerCase().includes(wanted) || servers.states[j] === wanted);
  const by = columns.find((column) => column.key === sorting.key);
  if (by) {
    const order = (a, b) => {
      const x = by.values[a], y = by.values[b];
      const less = by.text ? String(x).localeCompare(String(y), "en", { numeric: true }) : (x ?? -1) - (y ?? -1);
      return (sorting.down ? -less : less) || a - b;
    };
    which.sort(order);
  }
  const found = which.length;
  which = which.slice(0, MOST_ROWS);
  const active = servers.active.filter(Boolean).length;
  section.querySelector(".count").textContent =
    `${active} of ${all.length} servers active` + (found > which.length ? `; ${which.length} of ${found} shown` : wanted ? `; ${found} found` : "");
  const most = {};
  for (const column of columns) if (column.bar) most[column.key] = column.values.reduce((a, x) => Math.max(a, x || 0), 0) || 1;
  const body = section.querySelector("tbody");
  body.className = safe ? "safe" : "";
  while (body.children.length > which.length) body.lastElementChild.remove();
  which.forEach((j, i) => {
    let row = body.children[i];
    if (!row) body.append((row = element("tr")));
    row.className = servers.active[j] ? "" : "out";
    while (row.children.length > columns.length) row.lastElementChild.remove();
    columns.forEach((column, k) => {
      let cell = row.children[k];
      if (!cell) row.append((cell = element("td")));
      const className = `${column.key}${column.text ? " text" : ""}`;
      const text = column.show(column.values[j]);
      if (cell.className !== className || !cell.firstChild) {
        cell.className = className;
        cell.replaceChildren(document.createTextNode(""));
        if (column.bar) {
          const bar = element("span", "bar");
          bar.append(element("i"));
          cell.append(bar);
        }
      }
      if (cell.firstChild.data !== text) cell.firstChild.data = text;
      if (column.bar) cell.querySelector("i").style.width = `${(100 * (column.values[j] || 0)) / most[column.key]}%`;
    });
  });
}

function draw() {
  if (!last) return;
  const names = [...last.regions.map((region) => region.name), ...Object.keys(last.absent)];
  document.getElementById("nothing").hidden = names.length > 0;
  const tabs = document.getElementById("regions");
  const live = last.regions.filter((region) => region.producer === "alive").map((region) => region.name);
  if (!names.includes(shown)) picked = false;
  // Until somebody chooses, what is alive is of more interest.
  if (!picked && !live.includes(shown)) shown = live[0] ?? names[0] ?? null;
  if (tabs.dataset.names !== names.join()) {
    tabs.dataset.names = names.join();
    tabs.replaceChildren(...names.map((name) => {
      const button = element("button", "", name);
      button.addEventListener("click", () => { shown = name; picked = true; draw(); });
      return button;
    }));
  }
  for (const button of tabs.children) {
    button.setAttribute("aria-pressed", button.textContent === shown);
    button.className = live.includes(button.textContent) ? "" : "dead";
  }
  for (const [name, section] of sections) {
    section.hidden = name !== shown;
    if (!names.includes(name)) { section.remove(); sections.delete(name); }
  }
  if (shown === null) return;
  const section = sectionOf(shown);
  section.hidden = false;
  const region = last.regions.find((one) => one.name === shown);
  if (!region) {
    section.className = "region absent";
    section.querySelector(".name").textContent = shown;
    section.querySelector(".problem").hidden = false;
    section.querySelector(".problem").textContent = `${last.absent[shown]}; waiting for it`;
    return;
  }
  section.className = region.stale ? "region stale" : "region";
  heading(section, region);
  const points = past.get(shown) || [];
  const total = last.totals[shown] || {};
  for (const tile of TILES) {
    section.querySelector(`.value.${tile.key}`).textContent = tile.show(total[tile.key]);
    line(section.querySelector(`.plot-${tile.key}`), points, tile.key, last.time);
  }
  if (region.observation) table(section, region.observation.servers, region.observation.safe);
  const rows = strips.get(shown) || [];
  for (const place of section.querySelectorAll(".span")) place.textContent = duration(Math.round(spanOf(rows, last.time)));
  strip(section.querySelector(".strip-open"), rows, "open", last.time, color("--load"));
  strip(section.querySelector(".strip-weights"), rows, "weights", last.time, color("--weight"));
}

function remember(time, totals) {
  for (const [name, total] of Object.entries(totals)) {
    if (!past.has(name)) past.set(name, []);
    const points = past.get(name);
    points.push({ time, ...total });
    while (points.length && time - points[0].time > SPAN) points.shift();
  }
}

function picture(data) {
  last = data;
  remember(data.time, data.totals);
  for (const region of data.regions) {
    if (region.stale || !region.observation) continue;
    if (!strips.has(region.name)) strips.set(region.name, []);
    const rows = strips.get(region.name);
    // At most two a second: a strip has no more pixels.
    if (rows.length && data.time - rows[rows.length - 1].time < SPAN / MOST_LINES) continue;
    rows.push({ time: data.time, open: region.observation.servers.open, weights: region.observation.servers.weights });
    while (data.time - rows[0].time > SPAN) rows.shift();
  }
  if (!document.hidden) draw();
}

function connect() {
  const state = document.getElementById("connection");
  const source = new EventSource("events");
  source.addEventListener("past", (event) => {
    past.clear();
    for (const entry of JSON.parse(event.data)) remember(entry.time, entry.totals);
  });
  source.onmessage = (event) => {
    state.textContent = "live";
    state.className = "";
    picture(JSON.parse(event.data));
  };
  source.onerror = () => {
    state.textContent = "connection lost, trying again";
    state.className = "lost";
    // A browser gives up after an answer that is no event stream; we do not.
    if (source.readyState === EventSource.CLOSED) setTimeout(connect, 2000);
  };
}

document.addEventListener("visibilitychange", draw);
window.addEventListener("resize", draw);
connect();
