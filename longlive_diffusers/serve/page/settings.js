// The options of a start: what the form says, and the image that a video begins with.

const MAX_IMAGE_BYTES = 10 * 2 ** 20; // that the server takes

/** The fields of a start message that numbers were entered for. `inputs` maps the field's name to its value. */
export function numbers(inputs) {
  const entered = Object.entries(inputs).filter(([, text]) => text.trim() !== "");
  return Object.fromEntries(entered.map(([name, text]) => [name, Number(text)]));
}

export class Settings {
  #form;
  #image = null; // a data URL
  #complain;

  /** @param complain Called with a sentence where an image cannot be used. */
  constructor(form, complain) {
    this.#form = form;
    this.#complain = complain;
    const file = form.querySelector("#image-file");
    form.querySelector("#image-choose").addEventListener("click", () => file.click());
    form.querySelector("#image-remove").addEventListener("click", () => this.#setImage(null));
    file.addEventListener("change", () => {
      this.#take(file.files[0]);
      file.value = ""; // the same file may be chosen again
    });
    form.addEventListener("submit", (event) => event.preventDefault());
    this.#watchDrops();
    document.addEventListener("paste", (event) => {
      const [image] = imagesOf(event.clipboardData);
      if (!image) return; // text is pasted as ever
      event.preventDefault();
      this.#take(image);
    });
  }

  /** Say what is wrong beside its field, and return whether nothing is. */
  check() {
    if (this.#form.checkValidity()) return true;
    this.#form.closest("details").open = true;
    return this.#form.reportValidity();
  }

  /** What a start message says beside its prompt; `video` is what to send where the viewer has no choice made. */
  fields(video) {
    const value = (id) => this.#form.querySelector(`#${id}`).value;
    const inputs = { guidance_scale: value("guidance") };
    for (const name of ["seconds", "seed", "steps", "width", "height"]) inputs[name] = value(name);
    const image = this.#image ? { image: this.#image } : {};
    return { ...numbers(inputs), ...image, video: value("transport-choice") || video };
  }

  chooseVideo(video) {
    this.#form.querySelector("#transport-choice").value = video;
  }

  #watchDrops() {
    const isFile = (event) => event.dataTransfer.types.includes("Files");
    const { body } = document;
    document.addEventListener("dragover", (event) => {
      if (!isFile(event)) return;
      event.preventDefault(); // or the browser would leave the page for the file
      body.dataset.dropping = "";
    });
    document.addEventListener("dragleave", (event) => event.relatedTarget === null && delete body.dataset.dropping);
    document.addEventListener("drop", (event) => {
      delete body.dataset.dropping;
      if (!isFile(event)) return;
      event.preventDefault();
      this.#take(imagesOf(event.dataTransfer)[0]);
    });
  }

  #take(file) {
    if (!file?.type.startsWith("image/")) return this.#complain("Only an image can be the first frame.");
    if (file.size > MAX_IMAGE_BYTES) return this.#complain("The image is larger than 10 MiB.");
    const reader = new FileReader();
    reader.onload = () => this.#setImage(reader.result);
    reader.onerror = () => this.#complain("The image cannot be read.");
    reader.readAsDataURL(file);
  }

  #setImage(image) {
    this.#image = image;
    const preview = this.#form.querySelector("#image-preview");
    preview.hidden = this.#form.querySelector("#image-remove").hidden = image === null;
    if (image === null) preview.removeAttribute("src");
    else preview.src = image;
    this.#form.querySelector("#image-choose").textContent = image ? "Choose another" : "Choose an image";
    this.#form.querySelector("#image-hint").hidden = image !== null;
    if (image) this.#form.closest("details").open = true;
  }
}

function imagesOf(transfer) {
  return Array.from(transfer?.files ?? []).filter((file) => file.type.startsWith("image/"));
}
