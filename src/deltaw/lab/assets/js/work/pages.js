// The pages of the workbench, in the order of the list. A page is { address, title, notice, show(root, rest, query) }:
// `rest` is what the address has after its first slash, `query` a URLSearchParams; `show` draws into `root`, may be
// async, throws an Error with a sentence, and may give back a function that is called when the page is left.

import { page as adapters } from "./adapters.js";
import { page as ask } from "./ask.js";
import { page as compare } from "./compare.js";
import { page as diagnose } from "./diagnose.js";
import { page as runs } from "./runs.js";
import { page as tables } from "./tables.js";
import { page as train } from "./train.js";

export const PAGES = [train, runs, compare, adapters, diagnose, ask, tables];
