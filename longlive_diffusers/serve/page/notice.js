// The one place where the page says what went wrong.

const SHOWN_FOR = 10_000; // milliseconds

export class Notice {
  #timer = null;
  #element;
  #button;
  #act = () => {};

  constructor(element) {
    this.#element = element;
    this.#button = element.querySelector("#notice-action");
    element.querySelector("#notice-close").addEventListener("click", () => this.hide());
    this.#button.addEventListener("click", () => this.#act());
  }

  /** Show a sentence. It goes away by itself, unless there is something to do about it: { label, act }. */
  show(text, { kind = "error", action = null } = {}) {
    clearTimeout(this.#timer);
    this.#element.dataset.kind = kind;
    this.#element.querySelector("#notice-text").textContent = text;
    this.#button.hidden = action === null;
    this.#button.textContent = action?.label ?? "";
    this.#act = () => {
      this.hide();
      action?.act();
    };
    this.#element.hidden = false;
    if (!action) this.#timer = setTimeout(() => this.hide(), SHOWN_FOR);
  }

  hide() {
    clearTimeout(this.#timer);
    this.#element.hidden = true;
  }
}
