// Files: chosen, dropped, and saved.

function read(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve({ name: file.name, data: reader.result.split(",")[1] || "" });
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

export function wireFiles(board) {
  const { element, find, props, watch } = board, stage = find(".stage");
  let dropped = []; // what the dialog asks about

  async function upload(kind, files) {
    files = [...files];
    if (!files.length) return;
    if (files.reduce((sum, file) => sum + file.size, 0) > props.most) {
      board.status(`Too large: at most ${Math.floor(props.most / 2 ** 20)} MB at a time.`);
      return;
    }
    dropped = await Promise.all(files.map(read));
    send(kind);
  }
  function send(kind) {
    board.act(kind, kind === "image" ? dropped[0] : { files: dropped });
  }

  for (const kind of ["image", "masks"]) {
    const input = find(kind === "image" ? ".image-file" : ".mask-file");
    input.addEventListener("change", () => { upload(kind, input.files); input.value = ""; });
    find(`[data-do=${kind}]`).addEventListener("click", () => input.click());
  }
  find(".drop").addEventListener("click", () => find(".image-file").click());
  element.addEventListener("dragover", event => { event.preventDefault(); stage.classList.add("over"); });
  element.addEventListener("dragleave", () => stage.classList.remove("over"));
  element.addEventListener("drop", event => {
    event.preventDefault();
    stage.classList.remove("over");
    upload("drop", event.dataTransfer.files);
  });

  const ask = find(".ask");
  watch("question", () => {
    const { name, fits } = props.question, count = board.view.regions.length;
    ask.querySelector("p").textContent =
      `${name} would replace the image and its ${count} region${count === 1 ? "" : "s"}. Undo brings them back.`;
    ask.querySelector("[value=masks]").hidden = !fits;
    ask.returnValue = "";
    ask.showModal();
  });
  ask.addEventListener("close", () => { if (ask.returnValue) send(ask.returnValue); });

  watch("file", () => {
    const file = props.file;
    if (!file) return;
    const bytes = Uint8Array.from(atob(file.data), letter => letter.charCodeAt(0));
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([bytes], { type: file.kind }));
    link.download = file.name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });
}
