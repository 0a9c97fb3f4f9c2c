// A PodMonitor against the schema that the operator publishes.
const fs = require("fs");
const [, , modules, file] = process.argv;
const { PodMonitor } = require(`${modules}/@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1/PodMonitor`);
const given = JSON.parse(fs.readFileSync(file));
new PodMonitor(given).validate();
let refused = false;
try {
    given.spec.podMetricsEndpoints[0].interval = 15;
    new PodMonitor(given).validate();
} catch {
    refused = true;
}
if (!refused) {
    console.error("a number for a duration was accepted");
    process.exit(1);
}
