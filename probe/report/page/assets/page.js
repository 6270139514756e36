// The slider, the theme, the width of plots and the downloads. What is drawn, Python has made: a panel's figure, and
// for each probed step what differs from it.
(() => {
  "use strict";
  const page = JSON.parse(document.getElementById("page-data").textContent);
  const [slider, label, play, main] = ["step", "step-label", "play", "main"].map((id) => document.getElementById(id));
  const names = Object.keys(page.panels);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 640px)");
  const PRINT_WIDTH = 695; // A4 with margins of 12 mm, at 96 pixels an inch
  const NARROWEST = 560; // for the wide layouts
  let printing = false;
  const shownStep = () => page.steps[Number(slider.value)];

  // The index of the latest of `steps` (ascending) at or before the shown one; 0 where all are later.
  const latest = (steps) => Math.max(0, steps.findLastIndex((step) => step <= shownStep()));
  const stateOf = (panel) => panel.states[latest(panel.steps)];

  // A copy of `target` with `changes`, whose names may be paths ("error_y.array").
  function changed(target, changes) {
    const copy = structuredClone(target);
    for (const [path, value] of Object.entries(changes ?? {})) {
      const [last, ...outer] = path.split(".").reverse();
      outer.reduceRight((object, name) => (object[name] ??= {}), copy)[last] = value;
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
    for (const [axis, range] of Object.entries(state.ranges)) layout[axis].range = range;
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
    const next = [...waiting].find(onScreen) ?? [...waiting][0];
    pumping = next !== undefined;
    main.setAttribute("aria-busy", String(pumping));
    if (!pumping) return;
    waiting.delete(next);
    draw(next);
    setTimeout(pump);
  }

  function drawSoon() {
    names.forEach((name) => waiting.add(name));
    main.setAttribute("aria-busy", "true");
    if (!pumping) setTimeout(pump);
    pumping = true;
  }

  function showStep() {
    label.textContent = shownStep() < 0 ? "not known" : String(shownStep());
    slider.setAttribute("aria-valuetext", `step ${label.textContent}`);
    for (const place of document.querySelectorAll("[data-texts]")) {
      const texts = JSON.parse(place.dataset.texts);
      place.textContent = texts[latest(texts.map(([step]) => step))][1];
    }
    for (const name of names) {
      document.querySelector(`#${name}-title .state`).textContent = stateOf(page.panels[name]).title;
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
    const shown = new Set(panel && page.panels[panel].states.flatMap((state) => state.rows));
    const rows = [...Array(table.length).keys()].filter((row) => !panel || shown.has(row));
    const columns = Object.keys(table.columns);
    const quoted = (value) => {
      const text = String(value ?? "");
      return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
    };
    const lines = [columns, ...rows.map((row) => columns.map((column) => cell(table, column, row)))];
    const csv = lines.map((line) => line.map(quoted).join(",")).join("\n") + "\n";
    const href = URL.createObjectURL(new Blob([csv], { type: "text/csv" }));
    const link = Object.assign(document.createElement("a"), { href, download: file });
    link.click();
    setTimeout(() => URL.revokeObjectURL(href), 10000);
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
      head.append(Object.assign(document.createElement("th"), { scope: "col", textContent: column }));
    }
    const body = made.createTBody();
    for (const row of stateOf(panel).rows) {
      const line = body.insertRow();
      for (const column of columns) line.insertCell().textContent = cell(table, column, row) ?? "";
    }
    details.querySelector(".scroll").replaceChildren(made);
  }

  // Paper does not wait: all panels are drawn at once.
  function setPrinting(value) {
    if (printing === value) return;
    printing = value;
    waiting.clear();
    names.forEach(draw);
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
