// Pictures of 20 by 20, drawn with lines.
const ICONS = {
  send: "M10 16V4M5 9l5-5 5 5",
  stop: "M6 6h8v8H6z",
  copy: "M7 7h9v9H7zM4 13V4h9",
  check: "M4 10.5l4 4 8-9",
  retry: "M15.5 8A6 6 0 1 0 16 11M16 4v4h-4",
  edit: "M4 16l1-4 8.5-8.5 3 3L8 15z",
  plus: "M10 4v12M4 10h12",
  chats: "M3 5h14M3 10h14M3 15h9",
  download: "M10 3v10M6 9l4 4 4-4M4 17h12",
  sliders: "M3 6h6M13 6h4M3 14h2M9 14h8M11 4v4M7 12v4",
  attach: "M13.5 6.5l-6 6a1.5 1.5 0 0 0 2 2l6.500-6.500a3 3 0 0 0-4.500-4.500l-6.500 6.500a4.800 4.800 0 0 0 7 7l5-5",
  close: "M5 5l10 10M15 5L5 15",
  open: "M6 8l4 4 4-4",
};

const SVG = "http://www.w3.org/2000/svg";

const drawn = name => {
  const svg = document.createElementNS(SVG, "svg"), path = document.createElementNS(SVG, "path");
  svg.setAttribute("viewBox", "0 0 20 20");
  svg.setAttribute("class", `icon icon-${name}`);
  svg.setAttribute("aria-hidden", "true");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
};
