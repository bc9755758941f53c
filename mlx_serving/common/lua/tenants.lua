-- Tenants: what each has queued and running, and who is next. Follows the generated names; the prelude follows.
-- A job's tenant is a field of its control hash; jobs without one have nothing of what is here. Limits are held against two sets
-- a tenant: of all its queued jobs, and of the rows of all its running jobs. In each queue its queued jobs also stand in a line of
-- their own, and the tenants that have a line there take turns (see claim.lua). A producer only ever writes these keys and counts.

-- A stock tool or a hand may have left anything under one of these keys: that disturbs the shares, and stops nothing.
local function tolerantly(f, ...) return pcall(f, ...) end

local function line_of(queue, tenant) return k_line(queue .. ':' .. tenant) end

-- A tenant's limit on its LIMIT.queued jobs or LIMIT.running rows: its own, else the one of all; nil if there is none.
local function limit_of(tenant, kind)
  local values = redis.pcall('HMGET', k_limits(), kind .. TENANT_MARK .. tenant, kind)
  if values.err then return nil end
  local own, of_all = unpack(values)
  if own == 'none' then return nil end
  return tonumber(own or '') or tonumber(of_all or '')
end

local function members_of(set)
  local count = redis.pcall('SCARD', set)
  return type(count) == 'number' and count or 0
end

-- Why a tenant may not have this job too, as the reply says it; nil if it may.
local function refusal_of(tenant, rows)
  -- A limit of 0 only lets the tenant wait, and one row is the least that a job can have.
  local most_rows = rows > 1 and limit_of(tenant, LIMIT.running)
  if most_rows and most_rows > 0 and rows > most_rows then return {0, '', LIMIT.running, most_rows, rows} end
  local limit = limit_of(tenant, LIMIT.queued)
  local queued = limit and members_of(k_tenant_queued(tenant))
  if limit and queued >= limit then return {0, '', LIMIT.queued, limit, queued} end
end

-- Rows of the batch that a job takes: a choice is a row. What a foreign hand wrote counts as the most.
local function rows_of(job) return math.min(tonumber(job.rows or 1) or MOST_ROWS, MOST_ROWS) end

-- SADD or SREM of what a running job adds to its tenant's set: a member for each row, its id and '<id>:2' to '<id>:<rows>'. So the
-- set's size is the number of rows, and a job that is moved twice counts once. Returns how many members came or went.
local function move_rows(command, id, tenant, rows)
  local members = {id}
  for row = 2, rows do members[row] = id .. ':' .. row end
  return redis.call(command, k_tenant_running(tenant), unpack(members))
end

-- `push`: 'RPUSH' of a new job, 'LPUSH' of one that waited its turn before.
local function tenant_waits(id, queue, tenant, push)
  redis.call('SADD', k_tenant_queued(tenant), id)
  redis.call('SADD', k_tenants(), tenant)
  if redis.call(push, line_of(queue, tenant), id) == 1 then redis.call('RPUSH', k_turns(queue), tenant) end
end

local function leave_line(id, queue, tenant)
  local line = line_of(queue, tenant)
  if redis.call('LREM', line, 1, id) == 1 and redis.call('EXISTS', line) == 0 then
    redis.call('LREM', k_turns(queue), 0, tenant)
  end
end

local function tenant_runs(id, queue, tenant, rows)
  leave_line(id, queue, tenant)
  redis.call('SREM', k_tenant_queued(tenant), id)
  move_rows('SADD', id, tenant, rows)
end

-- A set that is empty is no key.
local function forget_idle(tenant)
  if redis.call('EXISTS', k_tenant_queued(tenant), k_tenant_running(tenant)) == 0 then
    redis.call('SREM', k_tenants(), tenant)
  end
end

local function tenant_ends(id, queue, tenant, rows)
  -- A job that ran stands in no line: looking for it would take as long as the line.
  if redis.call('SREM', k_tenant_queued(tenant), id) == 1 then leave_line(id, queue, tenant) end
  move_rows('SREM', id, tenant, rows)
  forget_idle(tenant)
end
