// Returns a line for each thing that is hard to read or to touch: text of low contrast (WCAG 2.2 AA) or small size,
// controls that are small or have a faint edge, and content that is wider than the window.
const isPhone = innerWidth < 600;
const smallestText = 12, smallestTarget = isPhone ? 44 : 24, smallestInput = isPhone ? 16 : 12;
const problems = new Set();
const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });

function parse(color) {
  canvas.clearRect(0, 0, 1, 1);
  canvas.fillStyle = color;
  canvas.fillRect(0, 0, 1, 1);
  const [red, green, blue, alpha] = canvas.getImageData(0, 0, 1, 1).data;
  return { channels: [red, green, blue], alpha: alpha / 255 };
}

function background(element) {
  const layers = [];
  for (let each = element; each; each = each.parentElement) layers.unshift(parse(getComputedStyle(each).backgroundColor));
  return layers.reduce((below, layer) => below.map((channel, i) => channel + (layer.channels[i] - channel) * layer.alpha),
    [255, 255, 255]);
}

function luminance(channels) {
  const [red, green, blue] = channels.map(channel => {
    const value = channel / 255;
    return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
}

function contrast(one, other) {
  const [dark, light] = [luminance(one), luminance(other)].sort((a, b) => a - b);
  return (light + 0.05) / (dark + 0.05);
}

function checkText(element, style, text) {
  const size = parseFloat(style.fontSize), isLarge = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
  const ratio = contrast(parse(style.color).channels, background(element));
  const name = `${element.tagName.toLowerCase()}#${element.id}.${element.className} ${text.trim().slice(0, 30)}`;
  if (ratio < (isLarge ? 3 : 4.5)) problems.add(`contrast ${ratio.toFixed(2)}: ${name}`);
  if (size < smallestText) problems.add(`text of ${size}px: ${name}`);
}

const isVisible = element => element.checkVisibility({ visibilityProperty: true }) && element.getClientRects().length > 0;
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement;
  if (walker.currentNode.data.trim() && isVisible(element)) checkText(element, getComputedStyle(element), walker.currentNode.data);
}
for (const control of document.querySelectorAll("button, a, input, select, textarea")) {
  if (!isVisible(control)) continue;
  const { width, height, right } = control.getBoundingClientRect(), style = getComputedStyle(control);
  const name = `${control.tagName.toLowerCase()}#${control.id}`;
  if (Math.min(width, height) < smallestTarget) problems.add(`target of ${width} x ${height}: ${name}`);
  if (right > innerWidth) problems.add(`outside: ${name}`);
  if (control.matches("input, select, textarea")) {
    checkText(control, style, "value");
    if (control.placeholder) checkText(control, getComputedStyle(control, "::placeholder"), control.placeholder);
    if (parseFloat(style.fontSize) < smallestInput) problems.add(`text of ${style.fontSize}: ${name}`);
    const edge = contrast(parse(style.borderTopColor).channels, background(control.parentElement));
    if (edge < 3) problems.add(`edge ${edge.toFixed(2)}: ${name}`);
  }
}
if (document.documentElement.scrollWidth > innerWidth) problems.add(`${document.documentElement.scrollWidth} px wide`);
for (const cell of document.querySelectorAll("#totals dt, #totals dd, th, td, header > *")) {
  if (isVisible(cell) && cell.scrollWidth > cell.clientWidth + 1 && getComputedStyle(cell).display !== "inline")
    problems.add(`cut: ${cell.tagName} ${cell.textContent.trim().slice(0, 30)}`);
}
return [...problems];
