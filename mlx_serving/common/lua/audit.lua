-- Puts a tenant's sets right if they and the jobs' control hashes disagree. The caller read the ids from the sets.
-- ARGV: two prefixes, tenant, then ids.
-- Returns for each job that was wrong: id, outcome (queued | running | closed).
local tenant = ARGV[3]
local FIRST_JOB = 4
local READ = field_list('state', 'tenant')
local queued, running = k_tenant_queued(tenant), k_tenant_running(tenant)
local done = {}

-- What is no set is moved aside, also if there is no id to look at; the jobs come back into the set as they move.
for _, key in ipairs({queued, running}) do members_of(key) end

local function is_in(set, id) return redis.call('SISMEMBER', set, id) == 1 end

local function audit(id)
  local job = find_fields(id, READ)
  local state = job.tenant == tenant and OPEN[job.state] and job.state or 'closed'
  if is_in(queued, id) == (state == 'queued') and is_in(running, id) == (state == 'running') then return end
  redis.call('SREM', queued, id)
  redis.call('SREM', running, id)
  if state ~= 'closed' then redis.call('SADD', state == 'queued' and queued or running, id) end
  done[#done + 1] = {id, state}
end

for at = FIRST_JOB, #ARGV do audit(ARGV[at]) end
forget_idle(tenant)
return answer(done)
