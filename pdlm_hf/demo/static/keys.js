// Keys: regions are reached with Tab, moved, resized and deleted; undo; the dialog with the keys.

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const MIDDLE = [0.375, 0.375, 0.625, 0.625]; // the box that a key adds

// A place in the order of Tab for every region. The one that had the focus keeps it, or that which took its place.
export function showSpots(board) {
  const spots = board.find(".spots"), held = [...spots.children].indexOf(document.activeElement);
  const id = held < 0 ? null : spots.children[held].dataset.region, { view, said } = board, count = view.regions.length;
  spots.replaceChildren(...view.regions.map((region, k) => {
    const spot = document.createElement("button"), [x, y, width, height] = region.box.map(share => `${100 * share}%`);
    spot.type = "button";
    spot.dataset.region = region.id;
    spot.ariaLabel = `Region ${k + 1} of ${count}: ${said && said.scores ? said.texts[k] : "not described yet"}`;
    Object.assign(spot.style, { left: x, top: y, width, height });
    spot.addEventListener("focus", () => board.point(k));
    spot.addEventListener("blur", () => board.point(-1));
    return spot;
  }));
  if (board.added) spots.lastElementChild?.focus();
  else if (held >= 0) {
    const same = [...spots.children].find(spot => spot.dataset.region === id);
    (same || spots.children[Math.min(held, count - 1)] || board.find("[data-tool=box]")).focus();
  }
  board.added = false;
}

export function wireKeys(board) {
  const { find } = board, keys = find(".keys");
  window.addEventListener("pdlm-refused", () => { board.added = false; });

  find(".spots").addEventListener("keydown", event => {
    const region = board.view.regions.find(one => String(one.id) === event.target.dataset.region);
    if (!region || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key in ARROWS) {
      const [right, down] = ARROWS[event.key];
      board.act("nudge", { id: region.id, resize: event.shiftKey, right, down });
    } else if (event.key === "Delete" || event.key === "Backspace") board.act("delete", { id: region.id });
    else if (event.key === "Escape") event.target.blur();
    else return;
    event.preventDefault();
  });

  find("[data-do=keys]").addEventListener("click", () => keys.showModal());
  document.addEventListener("keydown", event => {
    const typing = event.target.closest?.("textarea, select, dialog, input:not([type=range], [type=radio])");
    if (typing || event.altKey) return;
    const chord = event.ctrlKey || event.metaKey;
    if (chord && event.key.toLowerCase() === "z" && !event.shiftKey) {
      if (board.view) board.act("undo");
    } else if (!chord && event.key === "?") keys.showModal();
    else if (!chord && event.key.toLowerCase() === "b" && board.view) {
      board.added = true;
      board.act("box", { box: MIDDLE });
    } else return;
    event.preventDefault();
  });
}
