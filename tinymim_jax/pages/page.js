// Shows the values of a chart's lines at the pointer.
(function () {
  "use strict";
  const box = document.createElement("div");
  box.id = "pointer";
  box.hidden = true;
  document.body.append(box);
  const format = (value) => Number(value.toPrecision(4)).toString();
  for (const chart of document.querySelectorAll("svg.chart")) {
    const series = JSON.parse(chart.dataset.series);
    const frame = JSON.parse(chart.dataset.frame);
    const cursor = chart.querySelector(".cursor");
    const width = chart.viewBox.baseVal.width;
    chart.addEventListener("pointermove", (event) => {
      const area = chart.getBoundingClientRect();
      const across = ((event.clientX - area.left) / area.width) * width;
      const share = (across - frame.left) / (frame.right - frame.left);
      const wanted = frame.x[0] + Math.min(Math.max(share, 0), 1) * (frame.x[1] - frame.x[0]);
      const lines = series.map(([name, points]) => {
        const nearest = points.reduce((a, b) => (Math.abs(b[0] - wanted) < Math.abs(a[0] - wanted) ? b : a));
        return [nearest, name + ": " + format(nearest[1])];
      });
      const x = lines[0][0][0];
      const place = frame.left + ((x - frame.x[0]) / (frame.x[1] - frame.x[0] || 1)) * (frame.right - frame.left);
      cursor.setAttribute("x1", place);
      cursor.setAttribute("x2", place);
      cursor.setAttribute("visibility", "visible");
      box.textContent = frame.label + " " + format(x) + "\n" + lines.map((line) => line[1]).join("\n");
      box.hidden = false;
      box.style.left = Math.min(event.clientX + 12, window.innerWidth - box.offsetWidth - 8) + "px";
      box.style.top = event.clientY + 14 + "px";
    });
    chart.addEventListener("pointerleave", () => {
      cursor.setAttribute("visibility", "hidden");
      box.hidden = true;
    });
  }
})();
