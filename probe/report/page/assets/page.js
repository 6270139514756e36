// The slider, the metric, the theme, the width of plots and the downloads. What is drawn, Python has made: a panel's
// layouts, and its traces from each probed step on.
(async () => {
  "use strict";
  const packed = Uint8Array.from(atob(document.getElementById("page-data").textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const page = JSON.parse(await new Response(stream).text());
  const [slider, label, play, metric, main, saturated] = ["step", "step-label", "play", "metric", "main", "saturated"].map(
    (id) => document.getElementById(id),
  );
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const phone = matchMedia("(max-width: 640px)");
  const PRINT_WIDTH = 695; // A4 with margins of 12 mm, at 96 pixels an inch
  let printing = false;
  const all = (selector, each) => document.querySelectorAll(selector).forEach(each);
  const shownStep = () => page.steps[Number(slider.value)];
  // Of pairs [step, what holds from there on], ascending: at the shown step; the first where all are later.
  const latest = (states) => (states.findLast(([step]) => step <= shownStep()) ?? states[0])[1];

  function draw(name) {
    waiting.delete(name);
    const { layouts, frames } = page.panels[metric.value][name];
    const plot = document.getElementById(`${name}-plot`);
    const width = printing ? PRINT_WIDTH : plot.clientWidth;
    const layout = structuredClone(layouts[width < 560 ? "narrow" : "wide"]);
    for (const shape of layout.shapes) if (shape.name === "cursor") shape.x0 = shape.x1 = shownStep();
    const isDark = dark.matches && !printing;
    Object.assign(layout, { template: page.templates[isDark ? "dark" : "light"], width });
    layout.dragmode = phone.matches ? false : "zoom";
    let traces = JSON.stringify(latest(frames));
    if (isDark) for (const [from, to] of page.darkened) traces = traces.replaceAll(from, to);
    Plotly.react(plot, JSON.parse(traces), layout, { displayModeBar: false, scrollZoom: false });
  }

  // Panels that are to be drawn, those on the screen first, one a frame: the slider stays at hand.
  const waiting = new Set();
  let isDrawing = false;
  const onScreen = (name) => {
    const box = document.getElementById(name).getBoundingClientRect();
    return box.bottom > 0 && box.top < innerHeight;
  };

  async function drawSoon() {
    Object.keys(page.panels[metric.value]).forEach((name) => waiting.add(name));
    main.setAttribute("aria-busy", "true");
    if (isDrawing) return;
    for (isDrawing = true; waiting.size; await new Promise((drawn) => setTimeout(drawn))) {
      draw([...waiting].find(onScreen) ?? [...waiting][0]);
    }
    isDrawing = false;
    main.setAttribute("aria-busy", "false");
  }

  function show() {
    label.textContent = shownStep() < 0 ? "not known" : shownStep();
    slider.setAttribute("aria-valuetext", `step ${label.textContent}`);
    all(".panel", (panel) => {
      panel.querySelector(".state").textContent = latest(page.panels[metric.value][panel.id].titles);
    });
    const runs = page.saturated[metric.value];
    saturated.hidden = !runs;
    saturated.textContent = `saturated: in ${runs} it hardly moves until an ablation costs the whole margin; small is not zero`;
    drawSoon();
  }

  function download({ target }) {
    const { columns, rows } = page.tables[target.dataset.table];
    const quoted = (value) => (/[",\n]/.test(value) ? `"${value.replaceAll('"', '""')}"` : (value ?? ""));
    const text = [columns, ...rows].map((line) => line.map(quoted).join(",") + "\n").join("");
    const href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
    Object.assign(document.createElement("a"), { href, download: `${target.dataset.table}.csv` }).click();
    setTimeout(() => URL.revokeObjectURL(href), 10000);
  }

  // Paper does not wait: all panels are drawn at once.
  function setPrinting(value) {
    if (printing === value) return;
    printing = value;
    Object.keys(page.panels[metric.value]).forEach(draw);
  }

  let timer = null;
  function setPlaying(value) {
    clearInterval(timer);
    timer = value ? setInterval(playOn, 700) : null;
    play.textContent = value ? "Pause" : "Play";
    play.setAttribute("aria-pressed", value);
    if (value && slider.value === slider.max) slider.value = slider.min;
    show();
  }
  function playOn() {
    slider.value = Number(slider.value) + 1;
    show();
    if (slider.value === slider.max) setPlaying(false);
  }

  slider.addEventListener("input", () => setPlaying(false));
  play.addEventListener("click", () => setPlaying(timer === null));
  metric.addEventListener("change", show);
  all("button[data-table]", (button) => button.addEventListener("click", download));
  dark.addEventListener("change", drawSoon);
  matchMedia("print").addEventListener("change", (event) => setPrinting(event.matches));
  addEventListener("beforeprint", () => setPrinting(true));
  addEventListener("afterprint", () => setPrinting(false));
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth !== width && !printing) drawSoon();
    width = innerWidth;
  });
  show();
})();
