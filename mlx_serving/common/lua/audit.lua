-- Puts a tenant's sets right if they and the jobs' control hashes disagree. The caller read the members from the sets: ids, and
-- rows of running jobs (`move_rows`).
-- ARGV: two prefixes, tenant, then members.
-- Returns for each job that was wrong: id, outcome (queued | running | closed).
local tenant = ARGV[3]
local FIRST_JOB = 4
local READ = field_list('state', 'tenant', 'rows')
local queued, running = k_tenant_queued(tenant), k_tenant_running(tenant)
local done = {}

-- What is no set is moved aside, also if there is no id to look at; the jobs come back into the set as they move.
for _, key in ipairs({queued, running}) do members_of(key) end

local audited, told = {}, {}  -- ids: many members may be one job's

local function is_row(member, id, rows)
  local row = tonumber(string.match(member, '^[^:]*:(%d+)$') or 1)
  return member == id or row > 1 and row <= rows and member == id .. ':' .. int(row)
end

-- Return how many members had to come or go.
local function put_member_right(id, member, rows)
  local changes = member ~= id and redis.call('SREM', queued, member) or 0
  return changes + (is_row(member, id, rows) and 0 or redis.call('SREM', running, member))
end

local function put_job_right(id, state, rows)
  if state == 'running' then return redis.call('SREM', queued, id) + move_rows('SADD', id, tenant, rows) end
  return move_rows('SREM', id, tenant, rows) + redis.call(state == 'queued' and 'SADD' or 'SREM', queued, id)
end

local function audit(member)
  local id = string.match(member, '^[^:]*')
  local job = find_fields(id, READ)
  local state, rows = job.tenant == tenant and OPEN[job.state] and job.state or 'closed', rows_of(job)
  local changes = put_member_right(id, member, state == 'running' and rows or 0)
  if not audited[id] then changes, audited[id] = changes + put_job_right(id, state, rows), true end
  if changes > 0 and not told[id] then told[id], done[#done + 1] = true, {id, state} end
end

for at = FIRST_JOB, #ARGV do audit(ARGV[at]) end
forget_idle(tenant)
return answer(done)
