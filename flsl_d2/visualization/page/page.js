// What all pages have: a click on a picture shows it large.
"use strict";

document.addEventListener("click", (event) => {
  const shown = document.querySelector("dialog[open]");
  if (shown) {
    shown.close();
    shown.remove();
    return;
  }
  if (!event.target.matches("figure img, canvas.zoom")) return;
  const dialog = document.createElement("dialog");
  const picture = document.createElement("img");
  picture.alt = event.target.alt ?? event.target.ariaLabel;
  picture.src = event.target.src ?? event.target.toDataURL();
  dialog.append(picture);
  document.body.append(dialog);
  dialog.addEventListener("close", () => dialog.remove());
  dialog.showModal();
});
