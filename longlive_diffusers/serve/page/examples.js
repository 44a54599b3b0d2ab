// Prompts to begin with. The pipeline inside the package knows plain shapes and nothing else.

const SHAPES = [
  "a large red circle moves right on a black background",
  "a small blue square moves up, grey background",
  "a large yellow triangle moves left, teal background",
  "a green triangle stays still above a white cross that moves left, brown background",
];
const SCENES = [
  "A lighthouse in a storm, waves break over the rocks, low evening light",
  "A red fox walks through fresh snow between birches, the camera follows it",
  "A busy night market in the rain, neon signs are mirrored in the wet street",
];

export const SHAPES_HELP = "This model draws shapes: a color, a shape, how it moves, and a background.";

export function isEmbedded(model) {
  return /embedded|toy/i.test(model);
}

export function examples(model) {
  return isEmbedded(model) ? SHAPES : SCENES;
}
