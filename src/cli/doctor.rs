//! `vmcache doctor`.

use serde_json::json;

use super::args::{Common, Doctor};
use super::output::PREFLIGHT;
use super::progress::Progress;
use super::session::Session;
use super::{print, served, Outcome};
use crate::doctor::{look, Finding, State};
use crate::vm::birth::Birth;

/// Looks at this host, and prints what is found.
pub fn doctor(common: &Common, d: &Doctor) -> Outcome {
    let config = served(common)?;
    // A signal ends the guest that is booted, too.
    let session = Session::start()?;
    let progress = Progress::start("booting a guest");
    let findings = look(&config, !d.no_boot, &mut |birth: Birth<'_>| session.hold(birth));
    drop(progress);
    session.release();
    let missing = findings.iter().any(|f| f.state == State::Missing);
    match d.json.json {
        true => print::json(&json!({"good": !missing, "findings": findings}))?,
        false => show(&findings)?,
    }
    Ok(if missing { PREFLIGHT } else { 0 })
}

fn show(findings: &[Finding]) -> print::Printed {
    let mut rows = vec![["", "STATE", "EVIDENCE"].map(str::to_string).to_vec()];
    for Finding { name, state, evidence, remedy } in findings {
        let line = |text: &str| text.replace('\n', " ");
        rows.push(vec![(*name).to_string(), state.name().to_string(), line(evidence)]);
        if !remedy.is_empty() {
            rows.push(vec![String::new(), String::new(), format!("→ {}", line(remedy))]);
        }
    }
    print::table(&rows)
}
