// The slider, the theme, the width of plots and the downloads. What is drawn, Python has made: a panel's figure, and
// for each probed step what differs from it.
(() => {
  "use strict";
  const page = JSON.parse(document.getElementById("page-data").textContent);
  const slider = document.getElementById("step");
  const play = document.getElementById("play");
  const main = document.getElementById("main");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 640px)");
  const PRINT_WIDTH = 695; // A4 with margins of 12 mm, at 96 pixels an inch
  const NARROWEST = 560; // for the wide layouts
  let printing = false;
  const shownStep = () => page.steps[Number(slider.value)];
  const nameOf = (step) => (step < 0 ? "not known" : String(step));

  // The latest of `steps` (ascending) at or before `step`; the first where all are later.
  function latest(steps, step) {
    let found = 0;
    steps.forEach((value, index) => {
      if (value <= step) found = index;
    });
    return found;
  }

  const stateOf = (panel) => panel.states[latest(panel.steps, shownStep())];

  // A copy of `target` with `changes`, whose names may be paths ("error_y.array").
  function changed(target, changes) {
    const copy = structuredClone(target);
    for (const [path, value] of Object.entries(changes || {})) {
      const names = path.split(".");
      const last = names.pop();
      const inner = names.reduce((object, name) => (object[name] ??= {}), copy);
      inner[last] = value;
    }
    return copy;
  }

  function recoloured(traces) {
    const swap = (text, [from, to]) => text.replaceAll(from, to);
    return JSON.parse(page.darkened.reduce(swap, JSON.stringify(traces)));
  }

  function draw(name) {
    const panel = page.panels[name];
    const plot = document.getElementById(`${name}-plot`);
    const state = stateOf(panel);
    const width = printing ? PRINT_WIDTH : plot.clientWidth;
    const layout = structuredClone(panel.layouts[width < NARROWEST ? "narrow" : "wide"]);
    for (const [axis, changes] of Object.entries(state.axes)) Object.assign(layout[axis], changes);
    const isDark = dark.matches && !printing;
    layout.template = page.templates[isDark ? "dark" : "light"];
    layout.width = width;
    layout.dragmode = narrow.matches ? false : "zoom";
    const traces = panel.traces.map((trace, index) => changed(trace, state.traces[index]));
    Plotly.react(plot, isDark ? recoloured(traces) : traces, layout, { displayModeBar: false, scrollZoom: false });
  }

  // Panels that are to be drawn, those on the screen first, one a frame: the slider stays at hand.
  const waiting = new Set();
  let pumping = false;

  function onScreen(name) {
    const box = document.getElementById(name).getBoundingClientRect();
    return box.bottom > 0 && box.top < innerHeight;
  }

  function pump() {
    const names = [...waiting];
    const next = names.find(onScreen) ?? names[0];
    if (next === undefined) {
      pumping = false;
      main.setAttribute("aria-busy", "false");
      return;
    }
    waiting.delete(next);
    draw(next);
    setTimeout(pump);
  }

  function drawSoon() {
    Object.keys(page.panels).forEach((name) => waiting.add(name));
    main.setAttribute("aria-busy", "true");
    if (!pumping) {
      pumping = true;
      setTimeout(pump);
    }
  }

  function drawNow() {
    waiting.clear();
    Object.keys(page.panels).forEach(draw);
  }

  function showStep() {
    const step = shownStep();
    slider.setAttribute("aria-valuetext", `step ${nameOf(step)}`);
    document.getElementById("step-label").textContent = nameOf(step);
    for (const place of document.querySelectorAll("[data-text]")) {
      const text = page.texts[place.dataset.text];
      place.textContent = text.values[latest(text.steps, step)];
    }
    document.querySelectorAll("details[open]").forEach(fillNumbers);
    drawSoon();
  }

  // Tables: columns by name, each a list or one value for all rows.
  const cell = (table, column, row) => {
    const values = table.columns[column];
    return Array.isArray(values) ? values[row] : values;
  };

  function download(button) {
    const { table: tableName, panel, file } = button.dataset;
    const table = page.tables[tableName];
    let rows = [...Array(table.length).keys()];
    if (panel) {
      const shown = new Set(page.panels[panel].states.flatMap((state) => state.rows));
      rows = rows.filter((row) => shown.has(row));
    }
    const columns = Object.keys(table.columns);
    const quoted = (value) => {
      const text = value === null ? "" : String(value);
      return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
    };
    const lines = [columns, ...rows.map((row) => columns.map((column) => cell(table, column, row)))];
    const csv = lines.map((line) => line.map(quoted).join(",")).join("\n") + "\n";
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([csv], { type: "text/csv" }));
    link.download = file;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  // The numbers of a panel at the shown step, as a table.
  function fillNumbers(details) {
    const panel = page.panels[details.dataset.panel];
    const table = page.tables[panel.table];
    const columns = Object.keys(table.columns).filter((name) => Array.isArray(table.columns[name]));
    const made = document.createElement("table");
    made.createCaption().textContent = document.getElementById(`${details.dataset.panel}-title`).textContent;
    const head = made.createTHead().insertRow();
    for (const column of columns) {
      const th = document.createElement("th");
      th.scope = "col";
      th.textContent = column;
      head.append(th);
    }
    const body = made.createTBody();
    for (const row of stateOf(panel).rows) {
      const line = body.insertRow();
      for (const column of columns) line.insertCell().textContent = cell(table, column, row) ?? "";
    }
    details.querySelector(".scroll").replaceChildren(made);
  }

  function setPrinting(value) {
    if (printing === value) return;
    printing = value;
    drawNow();
  }

  let timer = null;
  function setPlaying(value) {
    clearInterval(timer);
    timer = null;
    play.textContent = value ? "Pause" : "Play";
    play.setAttribute("aria-pressed", String(value));
    if (!value) return;
    if (slider.value === slider.max) slider.value = slider.min;
    showStep();
    timer = setInterval(() => {
      slider.value = Number(slider.value) + 1;
      showStep();
      if (slider.value === slider.max) setPlaying(false);
    }, 700);
  }

  slider.addEventListener("input", () => {
    if (timer !== null) setPlaying(false);
    showStep();
  });
  play.addEventListener("click", () => setPlaying(timer === null));
  document.querySelectorAll("button[data-file]").forEach((button) => {
    button.addEventListener("click", () => download(button));
  });
  document.querySelectorAll("details[data-panel]").forEach((details) => {
    details.addEventListener("toggle", () => details.open && fillNumbers(details));
  });
  dark.addEventListener("change", drawSoon);
  matchMedia("print").addEventListener("change", (event) => setPrinting(event.matches));
  addEventListener("beforeprint", () => setPrinting(true));
  addEventListener("afterprint", () => setPrinting(false));
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth !== width && !printing) drawSoon();
    width = innerWidth;
  });
  showStep();
})();
