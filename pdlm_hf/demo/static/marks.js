// Tools: boxes, strokes and clicks on the image; what is under the pointer.

export function wireMarks(board) {
  const { element, find } = board, pen = find(".pen");
  let tool = "box", stroke = null;

  function choose(name) {
    tool = name;
    for (const button of element.querySelectorAll("[data-tool]")) {
      button.setAttribute("aria-pressed", button.dataset.tool === name);
    }
    find(".brush-size").hidden = name !== "brush";
  }
  for (const button of element.querySelectorAll("[data-tool]")) {
    button.addEventListener("click", () => choose(button.dataset.tool));
  }

  const within = value => Math.min(1, Math.max(0, value));
  function place(event) {
    const frame = pen.getBoundingClientRect();
    return [within((event.clientX - frame.left) / frame.width), within((event.clientY - frame.top) / frame.height)];
  }
  const radius = () => find(".brush-size").value / 1000;

  function sketch() {
    pen.width = pen.clientWidth;
    pen.height = pen.clientHeight;
    if (!stroke) return;
    const ink = pen.getContext("2d"), at = ([x, y]) => [x * pen.width, y * pen.height];
    ink.strokeStyle = tool === "box" ? "#2563eb" : "rgba(37, 99, 235, .55)";
    if (tool === "box") {
      const [x0, y0] = at(stroke[0]), [x1, y1] = at(stroke[stroke.length - 1]);
      ink.lineWidth = 2;
      ink.strokeRect(x0, y0, x1 - x0, y1 - y0);
    } else {
      ink.lineWidth = 2 * radius() * pen.width;
      ink.lineCap = ink.lineJoin = "round";
      ink.beginPath();
      ink.moveTo(...at(stroke[0]));
      for (const point of stroke) ink.lineTo(...at(point));
      ink.stroke();
    }
  }

  function under(event) { // number of the region, or -1
    const { labels } = board;
    if (!labels) return -1;
    const [x, y] = place(event), column = Math.min(labels.width - 1, Math.floor(x * labels.width));
    return labels.data[4 * (Math.min(labels.height - 1, Math.floor(y * labels.height)) * labels.width + column)] - 1;
  }

  pen.addEventListener("pointerdown", event => {
    if (!board.view || event.button !== 0 || !event.isPrimary) return;
    event.preventDefault();
    if (tool === "click") return board.act("click", { point: place(event) });
    try { pen.setPointerCapture(event.pointerId); } catch (error) { /* the pointer is gone already */ }
    stroke = [place(event)];
    board.point(-1);
  });
  pen.addEventListener("pointermove", event => {
    if (!stroke) return board.point(under(event));
    stroke.push(place(event));
    sketch();
  });
  pen.addEventListener("pointerup", event => {
    if (!stroke) return;
    const [first, last] = [stroke[0], stroke[stroke.length - 1]];
    const wide = Math.abs(first[0] - last[0]) * pen.clientWidth, high = Math.abs(first[1] - last[1]) * pen.clientHeight;
    if (tool === "brush") board.act("brush", { points: stroke, radius: radius() });
    else if (wide > 3 && high > 3) board.act("box", { box: [...first, ...last] });
    else board.point(under(event)); // a tap
    stroke = null;
    sketch();
  });
  pen.addEventListener("pointercancel", () => { stroke = null; sketch(); });
  pen.addEventListener("pointerleave", event => { if (event.pointerType !== "touch") board.point(-1); });
  choose("box");
}
