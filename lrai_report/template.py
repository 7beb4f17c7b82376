"""The page of `lrai report`, a template of jinja2: no script, and nothing from elsewhere."""

from typing import Final

PAGE: Final = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ manifest.name }}: LRAI report</title>
<style>
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --own: #0a7d4f; --dim: #777 }
@media (prefers-color-scheme: dark) { :root { --own: #4cc38a; --dim: #999 } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; margin: 0 } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem }
p.lead { font-size: 1.1rem; margin: .3rem 0 } .dim { color: var(--dim) }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th { text-align: left; font-weight: 600 } td, th { padding: .25rem .7rem .25rem 0;
  border-bottom: 1px solid var(--line); vertical-align: top }
td.long { overflow-wrap: anywhere } td.name, th { white-space: nowrap }
td.n, th.n { text-align: right; white-space: nowrap }
code, pre { font: 13px/1.5 ui-monospace, monospace } pre { background: var(--soft); padding: .7rem;
  overflow-x: auto; border-radius: 4px }
.bar { background: #999; height: .7rem; border-radius: 2px } .bar.own { background: var(--own) }
svg { width: 100%; height: auto; font: 11px system-ui, sans-serif; fill: currentColor }
svg line { stroke: var(--line) } circle { fill: #999 } circle.front { fill: #c47f17 }
circle.kept { fill: #3b7dd8 } circle.chosen { fill: var(--own) }
</style></head><body>
<h1>{{ manifest.name }}</h1>
<p class="lead">{% if chosen.id == "fp32" %}Served in float32, optimised{% if chosen.gate %}: no
other form was found that is worth it and passes{% endif %}.{% else %}Served as
<b>{{ chosen.id }}</b>, <b>{{ "%.2f"|format(chosen.speedup) }} times</b> as fast as float32 and
{{ "%.1f"|format(chosen.size_bytes / 1e6) }} MB.{% endif %}</p>
<p class="dim">{{ chosen.why }}</p>
{% for id, statement in certificates %}<p>Certificate <code>{{ id }}</code>: {{ statement }}</p>
{% endfor %}
{% if dots %}<h2>Forms that were tried</h2>
<svg viewBox="0 0 {{ frame.width }} {{ frame.height }}" role="img"
 aria-label="speed against closeness of every form that was tried">
{% for tick in upward %}<line x1="{{ frame.left }}" x2="{{ frame.right }}" y1="{{ tick.at }}"
 y2="{{ tick.at }}"/><text x="{{ frame.left - 8 }}" y="{{ tick.at + 4 }}"
 text-anchor="end">{{ tick.text }}</text>{% endfor %}
{% for tick in across %}<text x="{{ tick.at }}" y="{{ frame.bottom + 18 }}"
 text-anchor="middle">{{ tick.text }}</text>{% endfor %}
<text x="{{ frame.right }}" y="{{ frame.bottom + 36 }}" text-anchor="end">times as fast as
 float32 →</text><text x="{{ frame.left + 8 }}" y="{{ frame.top + 12 }}">difference on the
 search rows, root mean square (lower is closer)</text>
{% for dot in dots %}<circle class="{{ dot.role }}" cx="{{ dot.x }}" cy="{{ dot.y }}" r="5"><title>
{{ dot.form }}: {{ "%.2f"|format(dot.speedup) }} x, {{ "%.2g"|format(dot.gap) }}</title></circle>
<text x="{{ dot.x - 9 if dot.x > frame.right - 120 else dot.x + 9 }}" y="{{ dot.label_y }}"
 {% if dot.x > frame.right - 120 %}text-anchor="end"{% endif %}>{{ dot.form }}</text>{% endfor %}
</svg>
<p class="dim">Green is chosen, blue is kept beside it; orange was not kept, though none that is
as close is faster. Float32 is at the bottom, however close it is.</p>{% endif %}
{% if tried %}<div class="scroll"><table><tr><th>form</th><th>kept</th><th>why</th></tr>
{% for one in tried %}<tr><td class="name">{{ one.form }}</td><td>
{{ "not judged" if one.batch_effect is none else "no" if not one.kept else "yes" if
one.form.partition(" ")[0] in kept else "no, though it passed" }}</td>
<td class="long">{{ one.why }}</td></tr>
{% endfor %}</table></div>{% endif %}
{% if points %}<h2>Latency</h2>
<div class="scroll"><table><tr><th>rows{% if points[0].length %} x length{% endif %}</th>
<th>form</th><th class="n">median</th><th class="n">spread</th><th style="width:40%"></th></tr>
{% for point in points %}{% for name, at, share in point.bars %}<tr><td>{% if loop.first %}
{{ point.rows }}{% if point.length %} x {{ point.length }}{% endif %}{% endif %}</td>
<td>{{ name }}</td><td class="n">{{ at.median_ms|figure }} ms</td>
<td class="n">± {{ "%.2g"|format(at.spread_ms / 2) }}</td><td><div
 class="bar{{ ' own' if name in serving and name != 'fp32' else '' }}"
 style="width:{{ "%.1f"|format(share) }}%"></div></td></tr>{% endfor %}{% endfor %}
</table></div>{% endif %}
<h2>Accuracy and closeness</h2>
<div class="scroll"><table><tr><th>form</th><th>measure</th><th class="n">found</th>
<th class="n">bound, ≥ 95 %</th><th class="n">p50</th><th class="n">p99</th><th class="n">max</th>
<th class="n">rows</th></tr>
{% for variant in manifest.variants if variant.gate %}{% set gate = variant.gate %}<tr>
<td>{{ variant.id }}</td><td>{{ gate.measure }}</td>
{% if gate.accuracy_loss is not none and gate.accuracy_loss_bound is not none %}<td class="n">loss
 {{ "%.2f"|format(100 * gate.accuracy_loss) }} %</td>
<td class="n">≤ {{ gate.accuracy_loss_bound|percent(1)|replace("%", " %") }}</td>
{% elif gate.agreement is not none and gate.agreement_bound is not none %}
<td class="n">{{ "%.2f"|format(100 * gate.agreement) }} %</td>
<td class="n">≥ {{ gate.agreement_bound|percent(-1)|replace("%", " %") }}</td>
{% else %}<td></td><td></td>{% endif %}
{% for name in ("p50", "p99", "max") %}<td class="n">{% if name in gate.difference %}
{{ gate.difference[name]|distance }}{% endif %}</td>{% endfor %}
<td class="n">{{ gate.rows }}</td></tr>
{% else %}<tr><td colspan="8">Nothing was judged: no evaluation rows were given.</td></tr>
{% endfor %}</table></div>
{% if chosen.gate and chosen.gate.groups %}<h2>Groups of people</h2>
{% macro fare(rates) %}<td>{% for name, rate in rates.items() %}{{ name }} {{ rate|figure(4)
}}{{ "" if loop.last else ", " }}{% endfor %}</td>{% endmacro %}
<div class="scroll"><table><tr><th>attribute</th><th>group</th><th>how its decisions fare</th>
{% if before %}<th>in float32</th>{% endif %}</tr>
{% for attribute, groups in chosen.gate.groups.items() %}{% for group, rates in groups.items() %}
<tr><td>{{ attribute }}</td><td>{{ group }}</td>{{ fare(rates) }}
{% if before %}{{ fare(before.get(attribute, {}).get(group, {})) }}{% endif %}</tr>
{% endfor %}{% endfor %}</table>
<table><tr><th>difference between groups</th><th class="n">float32</th>
<th class="n">{{ chosen.id }}</th><th>wider by</th></tr>
{% for one in chosen.gate.disparities %}<tr><td>{{ one.measure }} by {{ one.attribute }}</td>
{% if one.widened_bound is none %}<td></td><td></td><td>insufficient data{% else %}
<td class="n">{{ "%.2f"|format(100 * one.source) }} %</td>
<td class="n">{{ "%.2f"|format(100 * one.variant) }} %</td><td>
{{ one.widened_bound|percent(1)|replace("%", " %") }} at most{% endif %}
{% for group in chosen.gate.groups.get(one.attribute, {}) if group not in one.groups %}{{
"; too few rows of " if loop.first else ", " }}{{ group }}{% endfor %}</td></tr>
{% endfor %}</table></div>{% endif %}
{% if operators %}<h2>Operators{% if operators[0].variant not in kept %} of the closest form,
which is not kept{% endif %}</h2>
<div class="scroll"><table><tr><th>form</th><th>operator</th><th>kind</th><th class="n">bits</th>
<th>scheme</th><th class="n">weights</th><th class="n">error of weights</th>
<th class="n">share of harm</th></tr>
{% for one in operators %}<tr><td class="name">{{ one.variant }}</td>
<td class="long">{{ one.node }}</td>
<td>{{ one.op_type }}</td><td class="n">{{ one.bits }}</td>
<td>{{ one.scheme }}{% if one.why %}: {{ one.why }}{% endif %}</td>
<td class="n">{{ one.weight_elements or "" }}</td>
<td class="n">{% if one.weight_elements %}{{ "%.2f"|format(100 * one.error) }} %{% endif %}</td>
<td class="n">{% if one.harm %}{{ "%.1f"|format(100 * one.harm) }} %{% endif %}</td></tr>
{% endfor %}</table></div>{% endif %}
<h2>Where the time of one row goes</h2>
{% if spent %}<div class="scroll"><table><tr><th>kind of operator</th>
{% for name in both %}<th class="n">{{ name }}</th>{% endfor %}</tr>
{% for kind, taken in spent.items() %}<tr><td class="name">{{ kind }}</td>
{% for one in taken %}<td class="n">{{ one|figure ~ " ms" if one else "" }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
<p class="dim">Measured with this page by onnxruntime's profiler, or the engine's that is named: it
takes its time.</p>{% else %}<p class="dim">It was not measured: {{ unknown }}.</p>{% endif %}
<h2>Model card</h2>
<table>
<tr><th>inputs</th><td>{% for spec in manifest.signature.inputs %}<code>{{ spec.name }}</code>
{{ spec.datatype }} [{{ spec.shape|join(", ") }}]<br>{% endfor %}</td></tr>
<tr><th>outputs</th><td>{% for spec in manifest.signature.outputs %}<code>{{ spec.name }}</code>
{{ spec.datatype }} [{{ spec.shape|join(", ") }}], compared {{ spec.output_map }}<br>{% endfor %}
</td></tr>
<tr><th>source</th><td>{{ manifest.source.operators }} operators, opset {{ manifest.source.opset }},
 sha256 <code>{{ manifest.source.sha256[:16] }}…</code></td></tr>
<tr><th>artifact</th><td>version <code>{{ artifact.version }}</code>, made {{ manifest.created }} by
 lrai {{ manifest.lrai_version }}</td></tr>
<tr><th>measured on</th><td>{{ made_for }},
 {{ manifest.target.threads }} thread(s)</td></tr>
<tr><th>batch effect</th><td>{% if chosen.gate %}{{ "%g"|format(chosen.batch_effect) }}: twice what
 moved a gate row among others, at least 0.0001{% else %}not measured{% endif %}</td></tr>
{% for note in notes %}<tr><th>{{ "notes" if loop.first else "" }}</th><td>{{ note }}</td></tr>
{% endfor %}</table>
<h2>Again, as far as the artifact tells</h2>
<pre>{{ command }}
{% set name = artifact.path.absolute().name %}lrai inspect {{ name|quote }}
{% for id, _ in certificates %}lrai certificate check {{ (name ~ "/certificates/" ~ id ~
 ".json")|quote }} --artifact {{ name|quote }}{% if not manifest.source.file %} --source MODEL
{%- endif %}
{% endfor %}</pre>
</body></html>
"""
