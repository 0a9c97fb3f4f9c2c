//! `vmcache agent matrix`.

use serde_json::{json, Map, Value};

use super::args::AgentCommand;
use super::output::{Failure, FAILED};
use super::{print, Outcome};
use crate::agent::{matrix, Kind};

/// Which agent has which call.
pub fn agent(command: &AgentCommand) -> Outcome {
    let AgentCommand::Matrix(json) = command;
    let failed = |e| Failure::of(FAILED, &e);
    if !json.json {
        print::block(matrix::markdown().map_err(failed)?)?;
        return Ok(0);
    }
    let rows = matrix::matrix().map_err(failed)?.into_iter().map(|row| {
        let support: Map<String, Value> = Kind::ALL
            .into_iter()
            .zip(row.support)
            .map(|(kind, s)| (kind.title().to_string(), s.sign().into()))
            .collect();
        json!({"method": row.method, "call": row.call, "support": support})
    });
    print::json(&Value::Array(rows.collect()))?;
    Ok(0)
}
