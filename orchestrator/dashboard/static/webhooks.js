// A form that was refused is open again, with what was said in it.
document.querySelector("dialog[data-shown]")?.showModal();
