// Starts what the page holds. Without this script, or in a browser too old for it, the tables still say it all.

function begin() {
  const data = pageData("drawn");
  if (!data) return;
  document.documentElement.classList.add("scripted");
  const timeline = document.getElementById("timeline");
  if (timeline && data.timeline) new TimelineView(timeline, timelineModel(data.timeline, data.names));
  const flame = document.getElementById("flame");
  if (flame && data.flame) new FlameView(flame, data.flame, data.names);
}

begin();
