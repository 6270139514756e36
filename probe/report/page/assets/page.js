// The slider, the theme, the width of plots and the downloads. What is drawn, Python has made: a panel's figure, and
// for each probed step what differs from it.
(() => {
  "use strict";
  const page = JSON.parse(document.getElementById("page-data").textContent);
  const [slider, label, play, main] = ["step", "step-label", "play", "main"].map((id) => document.getElementById(id));
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 640px)");
  const PRINT_WIDTH = 695; // A4 with margins of 12 mm, at 96 pixels an inch
  const NARROWEST = 560; // for the wide layouts
  let printing = false;
  const all = (selector, each) => document.querySelectorAll(selector).forEach(each);
  const shownStep = () => page.steps[Number(slider.value)];
  // The latest of `states` (by step, ascending) at or before the shown step; the first where all are later.
  const latest = (states) => states.findLast(({ step }) => step <= shownStep()) ?? states[0];

  function draw(name) {
    waiting.delete(name);
    const { traces, layouts, states } = page.panels[name];
    const plot = document.getElementById(`${name}-plot`);
    const state = latest(states);
    const width = printing ? PRINT_WIDTH : plot.clientWidth;
    const layout = structuredClone(layouts[width < NARROWEST ? "narrow" : "wide"]);
    for (const [axis, range] of Object.entries(state.ranges)) layout[axis].range = range;
    const isDark = dark.matches && !printing;
    const template = page.templates[isDark ? "dark" : "light"];
    Object.assign(layout, { template, width, dragmode: narrow.matches ? false : "zoom" });
    let drawn = JSON.stringify(traces.map((trace, index) => ({ ...trace, ...state.traces[index] })));
    if (isDark) for (const [from, to] of page.darkened) drawn = drawn.replaceAll(from, to);
    Plotly.react(plot, JSON.parse(drawn), layout, { displayModeBar: false, scrollZoom: false });
  }

  // Panels that are to be drawn, those on the screen first, one a frame: the slider stays at hand.
  const waiting = new Set();
  let isDrawing = false;

  function onScreen(name) {
    const box = document.getElementById(name).getBoundingClientRect();
    return box.bottom > 0 && box.top < innerHeight;
  }

  async function drawSoon() {
    Object.keys(page.panels).forEach((name) => waiting.add(name));
    main.setAttribute("aria-busy", "true");
    if (isDrawing) return;
    for (isDrawing = true; waiting.size; await new Promise((drawn) => setTimeout(drawn))) {
      draw([...waiting].find(onScreen) ?? [...waiting][0]);
    }
    isDrawing = false;
    main.setAttribute("aria-busy", "false");
  }

  function showStep() {
    label.textContent = shownStep() < 0 ? "not known" : shownStep();
    slider.setAttribute("aria-valuetext", `step ${label.textContent}`);
    all("[data-texts]", (place) => {
      const states = JSON.parse(place.dataset.texts).map(([step, text]) => ({ step, text }));
      place.textContent = latest(states).text;
    });
    all(".panel", (panel) => {
      panel.querySelector(".state").textContent = latest(page.panels[panel.id].states).title;
    });
    all("details[open]", fillNumbers);
    drawSoon();
  }

  // Some rows of columns, each of which is a list, or one value for all rows.
  const cells = (columns, rows) =>
    rows.map((row) => columns.map((values) => (Array.isArray(values) ? values[row] : values) ?? ""));

  function download({ target }) {
    const { table: name, panel, file } = target.dataset;
    const table = page.tables[name];
    const shown = new Set(page.panels[panel]?.states.flatMap(({ rows }) => rows));
    const rows = [...Array(table.length).keys()].filter((row) => !panel || shown.has(row));
    const quoted = (value) => (/[",\n]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value);
    const lines = [Object.keys(table.columns), ...cells(Object.values(table.columns), rows)];
    const csv = lines.map((line) => line.map(quoted).join(",") + "\n").join("");
    const href = URL.createObjectURL(new Blob([csv], { type: "text/csv" }));
    Object.assign(document.createElement("a"), { href, download: file }).click();
    setTimeout(() => URL.revokeObjectURL(href), 10000);
  }

  // The numbers of a panel at the shown step, as a table without the columns that always hold the same.
  function fillNumbers(details) {
    const panel = details.closest(".panel");
    const { table, states } = page.panels[panel.id];
    const columns = Object.entries(page.tables[table].columns).filter(([, values]) => Array.isArray(values));
    const made = document.createElement("table");
    made.createCaption().textContent = panel.querySelector("h3").textContent;
    const head = made.createTHead().insertRow();
    for (const [name] of columns) {
      head.append(Object.assign(document.createElement("th"), { scope: "col", textContent: name }));
    }
    const body = made.createTBody();
    for (const line of cells(columns.map(([, values]) => values), latest(states).rows)) {
      const row = body.insertRow();
      for (const value of line) row.insertCell().textContent = value;
    }
    details.querySelector(".scroll").replaceChildren(made);
  }

  // Paper does not wait: all panels are drawn at once.
  function setPrinting(value) {
    if (printing === value) return;
    printing = value;
    Object.keys(page.panels).forEach(draw);
  }

  let timer = null;
  function setPlaying(value) {
    clearInterval(timer);
    timer = value ? setInterval(playOn, 700) : null;
    play.textContent = value ? "Pause" : "Play";
    play.setAttribute("aria-pressed", value);
    if (value && slider.value === slider.max) slider.value = slider.min;
    showStep();
  }

  function playOn() {
    slider.value = Number(slider.value) + 1;
    showStep();
    if (slider.value === slider.max) setPlaying(false);
  }

  slider.addEventListener("input", () => setPlaying(false));
  play.addEventListener("click", () => setPlaying(timer === null));
  all("button[data-file]", (button) => button.addEventListener("click", download));
  all("details", (details) => details.addEventListener("toggle", () => fillNumbers(details)));
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
